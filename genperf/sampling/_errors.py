"""What can be wrong with a model that is given to the sampler."""


class CaptureError(ValueError):
    """The model does something that the sampler cannot record or run; the message names where."""


class CausalityError(ValueError):
    """An output looks at pixels that are drawn later; the message names the node and its tap."""
