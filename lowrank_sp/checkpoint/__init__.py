"""Checkpoints on disk: read, initialized, verified and written without PyTorch."""

from lowrank_sp.checkpoint.adapter import Adapter as Adapter
from lowrank_sp.checkpoint.adapter import check_same_base as check_same_base
from lowrank_sp.checkpoint.bank import read_bank as read_bank
from lowrank_sp.checkpoint.bank import write_bank as write_bank
from lowrank_sp.checkpoint.demo import run_demo as run_demo
from lowrank_sp.checkpoint.demo import write_demo_model as write_demo_model
from lowrank_sp.checkpoint.initialize import initialize as initialize
from lowrank_sp.checkpoint.model import Checkpoint as Checkpoint
from lowrank_sp.checkpoint.model import Layer as Layer
from lowrank_sp.checkpoint.peft import read_adapter as read_adapter
from lowrank_sp.checkpoint.peft import write_adapter as write_adapter
from lowrank_sp.checkpoint.report import LayerReport as LayerReport
from lowrank_sp.checkpoint.report import Report as Report
from lowrank_sp.checkpoint.spectra import LayerSpectrum as LayerSpectrum
from lowrank_sp.checkpoint.spectra import check_figure as check_figure
from lowrank_sp.checkpoint.spectra import save_spectra as save_spectra
from lowrank_sp.checkpoint.spectra import spectra as spectra
from lowrank_sp.checkpoint.spectra import suggest_ranks as suggest_ranks
from lowrank_sp.checkpoint.tensors import CheckpointError as CheckpointError
from lowrank_sp.checkpoint.tensors import Tensor as Tensor
from lowrank_sp.checkpoint.tensors import read_object as read_object
from lowrank_sp.checkpoint.verify import LayerCheck as LayerCheck
from lowrank_sp.checkpoint.verify import Verification as Verification
from lowrank_sp.checkpoint.verify import verify as verify
