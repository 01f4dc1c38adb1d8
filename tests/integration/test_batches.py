"""Statistics of padded batches are those of the samples one by one, in every family, wherever the padding is."""

import pytest
from torch import Tensor, nn

from lvlm_prune.blocks import BlockRunner, prunable_linears
from lvlm_prune.data.batches import batch_key, collate
from lvlm_prune.distributed.processes import Processes
from lvlm_prune.loop.activations import Activations, recording, rows_of
from lvlm_prune.methods.pools import MixedPool
from lvlm_prune.methods.statistics import ChannelNorm
from lvlm_prune.pruning.calibration import BlockCalibration
from tests.families import FAMILIES, Sample, make_inputs, tiny_model
from tests.integration.test_families import TEXT_ONLY_REFUSED

Inputs = dict[str, Tensor]


def squared_norms(model: nn.Module, batches: list[Inputs]) -> dict[tuple[int, str], Tensor]:
    """(block, Linear) -> squared norm of each input channel over all tokens."""
    runner, found = BlockRunner(model), {}
    caught = [runner.catch(batch) for batch in batches]
    starts = [sum(len(batch.hidden) for batch in caught[:number]) for number in range(len(caught))]
    rows = [rows_of(batch, model.config, range(s, s + len(batch.hidden))) for batch, s in zip(caught, starts)]
    for index in range(len(runner)):
        # Routed experts that are modules of their own are not calibrated.
        linears = {name: one for name, one in prunable_linears(runner.block(index)).items() if ".experts." not in name}
        calibration = BlockCalibration(index, dict(zip(linears, linears)), MixedPool(), ChannelNorm, record=False)
        for batch, samples in zip(caught, rows):
            if not runner.calls(index, batch):
                continue
            hidden = batch.hidden
            with recording(linears) as record:
                output = runner.run(index, batch)
            for row in samples:
                sample = Activations(row, record, record.sites(), hidden, output, index)
                calibration.add(sample, sample.tokens())
            runner.advance(index, batch)
        calibration.finish(Processes(None), {})
        for name in linears:
            statistic = calibration.statistic_of(name)
            if statistic is not None:
                found[index, name] = statistic.squared_norms()
    return found


def in_batches(samples: list[Inputs], side: str) -> list[Inputs]:
    """As few batches as there can be: samples whose images are of one shape go together."""
    groups: dict[tuple, list[Inputs]] = {}
    for sample in samples:
        groups.setdefault(batch_key(sample), []).append(sample)
    return [collate(group, 0, side) for group in groups.values()]


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_do_not_depend_on_batches(family: str):
    model = tiny_model(family)
    kinds = [Sample(3, 0, 5), Sample(2, 0, 9), Sample(6, 3, 2), Sample(1, 3, 4)]
    if family not in TEXT_ONLY_REFUSED:
        kinds += [Sample(4, None, 6), Sample(2, None, 3)]
    samples = [make_inputs(family, model, [kind]) for kind in kinds]
    alone = squared_norms(model, samples)
    for side in ("left", "right"):
        batches = in_batches(samples, side)
        assert len(batches) < len(samples)
        together = squared_norms(model, batches)
        assert together.keys() == alone.keys()
        for key, norms in alone.items():
            difference = (together[key] - norms).abs().max() / norms.max()
            assert difference < 1e-6, (side, key, difference)
