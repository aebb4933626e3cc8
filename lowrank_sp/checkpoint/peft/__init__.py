"""The files of PEFT: read and written for every method that has a form here."""

from lowrank_sp.checkpoint.peft.config import check_number as check_number
from lowrank_sp.checkpoint.peft.config import check_pattern as check_pattern
from lowrank_sp.checkpoint.peft.config import pattern_value as pattern_value
from lowrank_sp.checkpoint.peft.methods import METHODS as METHODS
from lowrank_sp.checkpoint.peft.reading import read_adapter as read_adapter
from lowrank_sp.checkpoint.peft.writing import write_adapter as write_adapter
