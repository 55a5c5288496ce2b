from .inputs import stage_inputs as stage_inputs
from .pipeline import PIPELINE as PIPELINE
from .runner import run_recipe as run_recipe
from .stage import Stage as Stage
