"""The one error type of the policies: what a user asked for cannot be done."""


class PolicyError(ValueError):
    """A name, parameter, budget or missing input that a user can mend; the text says how."""
