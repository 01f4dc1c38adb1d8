"""Which callbacks take part in a run, in which order, and what they ask for together."""

from lightning.pytorch.callbacks import Callback, EarlyStopping, TQDMProgressBar

from lvlm_prune.callbacks import BlockwisePruning, PruneCallback, PruneProgressBar, RetentionEvaluation
from lvlm_prune.evaluation.builtin import BuiltinEngine
from lvlm_prune.methods.scorers import MagnitudeScorer
from lvlm_prune.runs.prune.participants import Participants, with_defaults

WRITTEN_AND_SCORED = ["SparseCheckpointWriter", "EmbeddedEvaluation", "BlockMetrics", "PruningReport"]


def names(callbacks: list[Callback]) -> list[str]:
    return [type(callback).__name__ for callback in callbacks]


def test_the_survey_comes_before_the_writer_and_the_page_last():
    given = [EarlyStopping("loss"), BlockwisePruning()]
    together = with_defaults(given, progress_bar=None)
    assert names(together) == ["EarlyStopping", "BlockwisePruning", "PluginSurvey", *WRITTEN_AND_SCORED]
    assert together[:2] == given


def test_an_evaluation_of_ones_own_follows_the_writer_and_takes_the_place_of_the_embedded_one():
    own = RetentionEvaluation(BuiltinEngine())
    together = with_defaults([own], progress_bar=None)
    assert names(together) == ["SparseCheckpointWriter", "RetentionEvaluation", "BlockMetrics", "PruningReport"]
    assert together[1] is own


def test_lightnings_bar_makes_way_and_ones_own_stays():
    lightnings, own = TQDMProgressBar(), PruneProgressBar()
    expected = ["SparseCheckpointWriter", "PruneProgressBar", *WRITTEN_AND_SCORED[1:]]
    assert names(with_defaults([lightnings], lightnings)) == expected
    kept = with_defaults([own], own)
    assert names(kept) == expected
    assert kept[1] is own


def test_demands_are_those_of_all_callbacks_and_may_change_during_the_run():
    class Onlooker(PruneCallback):
        needs = frozenset({"attention_map"})

    onlooker = Onlooker()
    participants = Participants([EarlyStopping("loss"), BlockwisePruning(scorer=MagnitudeScorer()), onlooker])
    assert not participants.gathers()
    assert not participants.samples()
    assert participants.needs() == {"attention_map"}
    onlooker.wants_survey, onlooker.survey_needs = True, frozenset({"outputs"})
    assert not participants.gathers()
    assert participants.samples()
    assert participants.surveying() == [onlooker]
    assert participants.survey_needs() == {"outputs"}
    onlooker.wants_activations = True
    assert participants.gathers()
