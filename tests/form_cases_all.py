"""Every form, as a case of the laws."""

import form_cases_layers
import form_cases_peft
import form_cases_rank
import form_cases_svd

CASES = [
    *form_cases_svd.CASES,
    *form_cases_rank.CASES,
    *form_cases_layers.CASES,
    *form_cases_peft.CASES,
]
LAYERED = form_cases_layers.LAYERED
