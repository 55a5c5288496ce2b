from .corpus import Corpus as Corpus, tokenize_corpus as tokenize_corpus
from .packed import PackedDataset as PackedDataset, batch_indices as batch_indices, collate as collate
from .rows import beginning as beginning
from .sources import DataError as DataError
