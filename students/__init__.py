"""Students: mixers, hybrid assembly, layer and transfer plans, and the modeling files that travel with a checkpoint.

`__init__.pyi` says what is here; it is loaded when it is first asked for, so that what needs no torch does not wait
for it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
