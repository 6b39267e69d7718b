"""The storage of a study: signs of life of its trials, and what becomes of those whose process died."""

import collections
import contextlib
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import optuna
import sqlalchemy
import sqlalchemy.exc
from optuna.trial import FrozenTrial, TrialState

from jaxhpo._core.errors import JaxhpoError

HEARTBEAT, GRACE = 10, 60  # seconds between signs of life of a trial, and without one until it counts as killed
MOST_RETRIES = 5  # of a trial that was killed: perhaps it is the reason
LOCKED = 60  # seconds that a process waits for others at an SQLite file
ATTEMPTS = 10  # to make the tables, where other processes do
ADDRESSES = '"sqlite:///study.db", or "postgresql+psycopg2://user@host/name" (with psycopg2 installed)'
PROBLEM, EXCESS = "problem", "excess"  # user attributes: why a trial failed; that it is one too many


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """While active, Optuna logs warnings only, and does not say what is experimental, or for `optimize`."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(max(before, optuna.logging.WARNING))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            warnings.filterwarnings("ignore", "Heartbeat of storage is supposed")
            yield
    finally:
        optuna.logging.set_verbosity(before)


def open_storage(address: str) -> optuna.storages.RDBStorage:
    """Opens an Optuna storage in which no trial is lost: those whose process was killed are begun again.

    Trials give a sign of life every ten seconds, and count as killed after a minute without one; then the next process
    that asks for a trial takes it up, with the losses that it had reported, at most five times in all.

    **Cost and bias**: a data base on disk, a transaction for each parameter and each reported loss; no data leave it.

    Args:
      address: `"sqlite:///study.db"`, a file on one machine; `"postgresql+psycopg2://user@host/name"`, for several
        (psycopg2 is the driver); or whatever SQLAlchemy opens.

    Returns:
      The storage, for `optuna.create_study(storage=...)`, or the `storage` of a search.

    Raises:
      JaxhpoError: no data base is there, nor can one be made.

    Example:
      >>> import optuna, tempfile
      >>> storage = jaxhpo.search.open_storage(f"sqlite:///{tempfile.mkdtemp()}/study.db")
      >>> study = optuna.create_study(storage=storage, study_name="digits", load_if_exists=True)
      >>> study.optimize(lambda trial: trial.suggest_float("x", 0.0, 1.0), n_trials=3)
      >>> len(study.trials), storage.get_heartbeat_interval()
      (3, 10)

    References:
      Akiba, Sano, Yanase, Ohta, Koyama. Optuna: A Next-generation Hyperparameter Optimization Framework. 2019.
      arXiv:1907.10902
    """
    if not isinstance(address, str) or "://" not in address:
        raise JaxhpoError(f"`storage` got {address!r}, which is no address: write {ADDRESSES}.")
    with quiet():
        again = optuna.storages.RetryHeartbeatStaleTrialCallback(MOST_RETRIES, inherit_intermediate_values=True)
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return optuna.storages.RDBStorage(
                    address,
                    engine_kwargs={"connect_args": {"timeout": LOCKED}} if address.startswith("sqlite") else {},
                    heartbeat_interval=HEARTBEAT,
                    grace_period=GRACE,
                    heartbeat_stale_trial_callback=again,
                )
            except sqlalchemy.exc.DBAPIError as error:  # as where another process makes the tables
                if attempt == ATTEMPTS:
                    raise JaxhpoError(f"`storage` {_told(address)} cannot be opened: {error.orig}.") from error
                time.sleep(0.1 * attempt)
            except (
                sqlalchemy.exc.ArgumentError,
                ImportError,
            ) as error:  # a driver that does not exist, or is not there
                problem = f"`storage` {_told(address)} cannot be opened: {error} Write {ADDRESSES}."
                raise JaxhpoError(problem) from error
    raise AssertionError("not reached")


def close(storage: optuna.storages.RDBStorage) -> None:
    """Closes the connections of a storage; it opens others where it is used again."""
    storage.remove_session()
    storage.engine.dispose()


def _told(address: str) -> str:
    """An address without its password."""
    try:
        return repr(sqlalchemy.engine.make_url(address).render_as_string(hide_password=True))
    except sqlalchemy.exc.ArgumentError:
        return "got an address that"


def beats(storage: Any) -> bool:
    """Returns whether trials in the storage give signs of life."""
    return getattr(storage, "get_heartbeat_interval", lambda: None)() is not None


@contextlib.contextmanager
def beating(storage: Any, ids: Callable[[], Iterable[int]]) -> Iterator[None]:
    """While active, trials give signs of life."""
    if not beats(storage):
        yield
        return
    ended = threading.Event()

    def beat():
        while not ended.wait(storage.get_heartbeat_interval()):
            for number in ids():
                with contextlib.suppress(Exception):  # the next one may come through
                    storage.record_heartbeat(number)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def put_back(storage: Any, study: optuna.Study, number: int) -> None:
    """Has a trial that will not end begun again, where the storage does that."""
    retry = getattr(storage, "get_heartbeat_stale_trial_callback", lambda: None)()
    if retry is not None:
        retry(study, study.get_trials(deepcopy=False)[number])


def first_attempt(trial: FrozenTrial) -> int:
    """The number of the first attempt at a trial."""
    return [*trial.system_attrs.get("retry_history", []), trial.number][0]


def attempts(study: optuna.Study) -> dict[int, FrozenTrial]:
    """The trials by the number of their first attempt: of each the first attempt that has not failed, or the last."""
    found: dict[int, FrozenTrial] = {}
    for trial in study.get_trials(deepcopy=False):
        first = first_attempt(trial)
        if EXCESS not in trial.user_attrs and (first not in found or found[first].state == TrialState.FAIL):
            found[first] = trial
    return found


def any_waits(study: optuna.Study) -> bool:
    """Returns whether a trial waits to be begun, or begun again."""
    return bool(study.get_trials(deepcopy=False, states=[TrialState.WAITING]))


class Others:
    """The trials of other processes, seen from one that has nothing to do.

    Args:
      storage: where they are.
      study: of which they are.
    """

    def __init__(self, storage: Any, study: optuna.Study):
        self.storage, self.study, self.seen = storage, study, collections.Counter[int]()

    def go_on(self) -> bool:
        """Returns whether some are still to end; mends two kinds of trials that would not, as their process was killed.

        One that has given no sign of life at all would count as alive for ever: one is given for it. One that somebody
        failed, as its process had died, without putting it back, is put back when it is met for the second time.
        """
        if not beats(self.storage):
            return False
        busy = any_waits(self.study)
        for trial in attempts(self.study).values():
            runs = trial.state == TrialState.RUNNING
            if runs or (trial.state == TrialState.FAIL and PROBLEM not in trial.user_attrs):
                self.seen[trial.number] += 1
                times = self.seen[trial.number]
                busy |= runs or times <= 2
                if runs and times == 1:
                    self.storage.record_heartbeat(trial._trial_id)
                if not runs and times == 2:
                    put_back(self.storage, self.study, trial.number)
        return busy
