"""Forms of the group "rank"; see ``form_cases.Case``."""

from form_cases import Case

CASES: list[Case] = []
