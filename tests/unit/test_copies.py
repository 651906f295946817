"""Objects that hold a metric can be copied, deep-copied and, for the default registry, pickled."""

import copy
import multiprocessing
import pickle
import threading

import pytest

import tapes
from tapes.errors import AddressInUse, InvalidArgument, KindConflict, MissingExtra, TapesError

MAKERS = ("counter", "meter", "histogram", "timer", "gauge")


class Job:
    def __init__(self, registry, maker):
        self.metric = getattr(registry, maker)(f"copies.{maker}", queue="mail", path='/"x"\n')
        self.timing = registry.timer("copies.timing").time()


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy])
def test_a_copy_of_a_metric_is_the_metric_itself(registry, maker, again):
    """A copy or deep copy of an object has the same metric, and so is a copied registry the same one."""
    job = Job(registry, maker)
    assert again(job).metric is job.metric
    assert again([job.metric])[0] is job.metric
    assert again(registry) is registry


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickled_metric_of_the_default_registry_is_the_same_one(maker, protocol):
    """A metric of the default registry that is pickled and loaded is the same metric, in every protocol."""
    job = Job(tapes.default_registry, maker)
    assert pickle.loads(pickle.dumps(job.metric, protocol)) is job.metric
    if protocol >= 2:  # slots
        assert pickle.loads(pickle.dumps(job, protocol)).metric is job.metric
    assert pickle.loads(pickle.dumps(tapes.default_registry, protocol)) is tapes.default_registry


def test_a_pickled_gauge_keeps_its_merge_mode():
    """A gauge that is pickled and loaded is the same one with its merge mode."""
    gauge = tapes.gauge("copies.highest", merge="max")
    assert pickle.loads(pickle.dumps(gauge)) is gauge


def test_a_maker_that_is_kept_in_an_object_can_be_copied_and_pickled():
    """The functions that make metrics can be pickled and copied."""
    assert pickle.loads(pickle.dumps(tapes.counter))("copies.maker") is tapes.counter("copies.maker")
    assert copy.deepcopy(tapes.counter)("copies.maker") is tapes.counter("copies.maker")


@pytest.mark.parametrize("maker", MAKERS)
def test_a_metric_of_another_registry_can_not_be_pickled_and_the_error_gives_the_remedy(registry, maker):
    """Pickling a metric of a registry other than the default one raises an error with the remedy."""
    with pytest.raises(
        InvalidArgument, match=f"can't be pickled: got <tapes {maker} .*default registry; make it"
    ):
        pickle.dumps(getattr(registry, maker)("m"))
    with pytest.raises(InvalidArgument, match="a registry can't be pickled"):
        pickle.dumps(registry)


def increment(job, done):
    job.metric.increment(5)
    done.put(tapes.default_registry.snapshot().get("copies.counter", queue="mail", path='/"x"\n').value)


def test_a_metric_in_the_arguments_of_a_spawned_process_counts_there():
    """A metric in the arguments of a spawned process is the one of that process's default registry."""
    context = multiprocessing.get_context("spawn")
    done = context.Queue()
    child = context.Process(target=increment, args=(Job(tapes.default_registry, "counter"), done))
    child.start()
    assert done.get(timeout=60) == 5
    child.join()


@pytest.mark.parametrize(
    "error",
    [
        TapesError("it is wrong", got=threading.Lock(), expected="it right", remedy="mend it"),
        MissingExtra("the aggregator", "distributed"),
        KindConflict("x", got="a"),
        AddressInUse("y", got=3),
    ],
)
@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda error: pickle.loads(pickle.dumps(error))])
def test_an_error_can_be_copied_and_pickled_with_its_parts(error, again):
    """Every error of tapes can be copied and pickled with its parts."""
    other = again(error)
    assert (type(other), str(other), other.args) == (type(error), str(error), error.args)
    assert (other.what, other.expected, other.remedy) == (error.what, error.expected, error.remedy)
    assert isinstance(other.got, (str, int, type(None)))


def test_an_imported_error_keeps_the_name_of_the_extra():
    """A pickled MissingExtra is an ImportError that names the extra."""
    other = pickle.loads(pickle.dumps(MissingExtra("the aggregator", "distributed")))
    assert isinstance(other, ImportError)
    assert "tapes[distributed]" in str(other)


def test_a_snapshot_and_its_stats_can_be_copied_and_pickled(registry):
    """Snapshots can be copied, and stats can be copied and pickled, with equal values."""
    registry.counter("a", x="1").increment()
    registry.timer("b").update(1.0)
    stats = registry.get_stats()
    assert pickle.loads(pickle.dumps(stats)) == copy.deepcopy(stats) == stats
    snapshot = copy.deepcopy(registry.snapshot())
    assert snapshot.get("b").sum == 1.0
