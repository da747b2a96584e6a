"""The error that all others of this package are.

Invariant: every error that has a class of its own here is an `EvalProtocolRftError`, and beside it
the built-in error that says what kind it is: a `ValueError` (what was given is wrong), a
`RuntimeError` (it cannot be done now; Eval Protocol does not roll a row out again on those), a
`TypeError` or an `ImportError`. An argument out of range is a plain `ValueError`.
"""


class EvalProtocolRftError(Exception):
    """Base of the errors of this package; the message says what, where and what to do next."""
