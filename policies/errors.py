"""The one error type of the policies: what a user asked for cannot be done."""


class PolicyError(ValueError):
    """A name, parameter, budget or missing input that a user can mend; the text says how."""


class BudgetTooSmall(PolicyError):
    """The expert budget cannot run the policy even in waves. ``smallest_bytes`` can."""

    def __init__(self, budget_bytes: int, smallest_bytes: int, why: str) -> None:
        self.smallest_bytes = smallest_bytes
        self.why = why
        super().__init__(
            f"the expert budget of {budget_bytes} bytes is too small: the smallest that can run is "
            f"{smallest_bytes} bytes ({why})"
        )
