"""Uses of modules on text."""

from __future__ import annotations

import pytest
import torch

from emoe.surgery.modules import anatomy_of
from emoe.surgery.usage import count_use, load_model


def uses(folder, tokens_BT: torch.Tensor, kind: str) -> dict[str, torch.Tensor]:
    model, quiet = load_model(folder, head=False), lambda *_: None
    return count_use(anatomy_of(folder), model, tokens_BT, kind=kind, batch=2, progress=quiet)


@pytest.mark.parametrize("kind", ["probability", "hard"])
@pytest.mark.parametrize("given", ["converted_llama", "tiny_moduleformer"])
def test_added_modules_leave_old_uses_alone(given, kind, run, request):
    """They are outside of the softmax: what they weigh is sigmoid(logit) where the logit is above 0."""
    model = request.getfixturevalue(given)
    tokens_BT = torch.randint(5, 96, (4, 32), generator=torch.Generator().manual_seed(0))
    extended = run("extend", model, "big", "--experts", 6)
    before, after = (uses(folder, tokens_BT, kind) for folder in (model, extended))
    anatomy, added = anatomy_of(extended), {}

    def see(name, seen) -> None:
        logits_NA = seen.logits_NE[:, len(before[name]) :]
        added[name] = ((logits_NA > 0) * (logits_NA.sigmoid() if kind == "probability" else 1)).sum(0).double()

    loaded = load_model(extended, head=False)
    with torch.no_grad(), anatomy.watch(loaded, see, energies=False):
        loaded(tokens_BT)
    assert any(use_E.sum() > 0 for use_E in added.values())
    for name, use_E in after.items():
        torch.testing.assert_close(use_E, torch.cat([before[name], added[name]]), rtol=1e-4, atol=1e-4)
