"""DIABLOGPT under the names of its own document: arguments are converted, the work is done by graft.

from diablogpt_pytorch import DIABLOGPT, DIABLOGPTDataset, TrainingWrapper
from diablogpt_pytorch.retrieval import tokenize, bert_embed, text_folder_to_chunks_
"""

from .alias import install_retro_alias
from .raw_dataset import DIABLOGPTDataset, DIABLOGPTdataset, RETRODataset
from .retro import DIABLOGPT, RETRO
from .training_wrapper import TrainingWrapper, top_k, top_p

__all__ = [
    "DIABLOGPT",
    "DIABLOGPTDataset",
    "DIABLOGPTdataset",
    "RETRO",
    "RETRODataset",
    "TrainingWrapper",
    "install_retro_alias",
    "top_k",
    "top_p",
]
