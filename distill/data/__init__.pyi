from .corpus import Corpus as Corpus, tokenize_corpus as tokenize_corpus
from .packed import PackedDataset as PackedDataset, batch_indices as batch_indices, collate as collate
from .sources import DataError as DataError
