"""Forms of the group "layers"; see ``form_cases.Case``."""

from form_cases import Case

CASES: list[Case] = []
