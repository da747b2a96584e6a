"""Reference losses in torch (extra `local`), for a plain training loop and for custom losses of
the training SDK.

    loss_fn = make_loss(batch.loss_fn, batch.loss_fn_config)
    loss, metrics = loss_fn(batch.datums, token_logprobs(model, batch.datums).logprobs)
    loss.backward()

Or, on a remote trainer: `client.forward_backward_custom(sdk_datums, loss_fn.for_sdk(datums))`.

`_tensors` is what they are computed from, `_policy` holds the losses, `_corrections` the weights
for a trainer and a sampler that disagree, `_objective` their sum and what is reported of it,
`_forward` the way from datums to log-probabilities.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
