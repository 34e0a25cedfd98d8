"""AdaptInfer's schedule."""

import pytest

from vlm_prune.pruning.adaptinfer import AdaptInfer
from vlm_prune.vlm.common.errors import InputError


def test_authors_presets_stand_where_the_code_prunes():
    cuts = AdaptInfer(preset="64").cuts(576, 32)
    assert [(cut.layer, cut.keep) for cut in cuts] == [(2, 133), (11, 27), (21, 3)]
    with pytest.raises(InputError, match="unknown preset"):
        AdaptInfer(preset="63")
