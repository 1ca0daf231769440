"""genperf.nn.Categorical is its ops."""

import torch
from genperf_testing.cases import normals

from genperf.nn import Categorical
from genperf.ops import categorical_sample


def test_categorical():
    logits = normals((3, 20, 5), "logits")
    ours = Categorical(logits, dim=1)
    theirs = torch.distributions.Categorical(logits=logits.movedim(1, -1))
    key = torch.tensor([1, 2])
    drawn = ours.sample(key=key)
    assert torch.equal(drawn, categorical_sample(logits, dim=1, key=key))
    torch.testing.assert_close(ours.log_prob(drawn), theirs.log_prob(drawn))
    assert torch.equal(ours.nll(drawn), -ours.log_prob(drawn))
    assert torch.equal(ours.mode, theirs.mode)
    limited = Categorical(logits, dim=1, temperature=0.5, top_k=1)
    assert torch.equal(limited.sample(), theirs.mode)
    assert torch.equal(limited.log_prob(theirs.mode), torch.zeros(3, 5))
