from .formats import FORMATS as FORMATS, ExportError as ExportError, Format as Format
from .write import export as export
