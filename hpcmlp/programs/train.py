"""Train a network on all ranks and keep everything needed to use or resume it."""

import os
import sys
import time
from collections import deque
from dataclasses import asdict, fields, replace
from functools import partial
from typing import Any, NoReturn

import numpy as np

from hpcmlp.comm import messages
from hpcmlp.comm.agreement import agreed, alike
from hpcmlp.comm.topology import Topology
from hpcmlp.config import TrainConfig, to_toml
from hpcmlp.data.manifest import Manifest
from hpcmlp.errors import ConfigError, HpcmlpError, StoppedAndSaved
from hpcmlp.launch import end_all
from hpcmlp.run.account import Account
from hpcmlp.run.coordinator import Console, check_alike, header, open_dataset, replica_error, versions
from hpcmlp.run.judge import Judge
from hpcmlp.run.numbers import MOST_SKIPS, ROLLBACK_FACTOR, judge, why_not_good
from hpcmlp.run.options import FREE_ON_RESUME, check_fits
from hpcmlp.run.parts import Parts
from hpcmlp.run.record import checkpoint_meta, header_rows, options, summary
from hpcmlp.run.signals import StopFlag, slurm_seconds_left
from hpcmlp.run.watchdog import END, INPUT, SAVE, STEP, VALIDATION, Watchdog, watch_limit
from hpcmlp.sync.control import ControlWords
from hpcmlp.sync.step import StepResult

FIRST_SAVE_S, FIRST_SAVE_RATE = 0.2, 100e6  # what a save is thought to take before one was measured: s, bytes/s
LEAD_MARGIN_S = 0.5
LAST_SAID = 32      # records that survivors of an elastic run can still tell


def main(config: TrainConfig, comm: Any) -> int:
    """Train as `config` says. Collective over `comm`; returns 0, or raises HpcmlpError."""
    if config.elastic:
        return run_elastic(config, comm)
    topology = Topology(comm)
    manifest = open_manifest(config, comm)
    directory = training = None
    with agreed(comm):
        if comm.rank == 0:
            from hpcmlp.run.directory import RunDirectory  # imports cost file-system calls: only where needed
            directory = RunDirectory(config.out, config.resume)
    try:
        # Whether numbers are finite is decided from the control words; NumPy's warnings would only add noise.
        with np.errstate(all="ignore"), Watchdog(topology, watch_limit(config), config.out, partial(end_all, comm)) \
                as watch:
            training = Training(config, Parts(config, topology, manifest), directory, watch)
            return training.run()
    finally:
        if training is not None:
            training.end_saving()
        if directory is not None:
            directory.release()
        if training is not None:
            training.end_without_lost(comm)
        topology.free()


def open_manifest(config: TrainConfig, comm: Any) -> Manifest:
    """Return the data set's manifest once it, the options and all ranks' software go together. Collective."""
    manifest = open_dataset(comm, config.data)
    with agreed(comm):
        check_fits(config, manifest, comm.size)
    check_alike(comm, {**asdict(config), **versions()})
    return manifest


def run_elastic(config: TrainConfig, world: Any) -> NoReturn:
    """Train and go on when ranks die. Collective over the ranks that live; the process ends here."""
    from hpcmlp.run.elastic import Elastic, require  # few runs want it
    require()
    whole = replace(config, sync="native", full_update=True)
    directories: list[Any] = []     # this rank's, from when it is rank 0

    def begin(topology: Topology, previous: Training | None) -> Training:
        manifest = open_manifest(config, topology.comm) if previous is None else previous.parts.manifest
        with agreed(topology.comm):
            if topology.rank == 0 and not directories:
                from hpcmlp.run.directory import RunDirectory
                directories.append(RunDirectory(config.out, config.resume, heir=previous is not None))
        watch = Watchdog(topology, watch_limit(config), config.out, partial(end_all, world), removes=True)
        try:
            if previous is None:
                parts = Parts(whole, topology, manifest)
            else:       # whoever has read a shard before has verified it
                parts = Parts(replace(whole, verify=False), topology, manifest, previous.session.network.params)
            training = Training(whole, parts, directories[0] if directories else None, watch, previous)
        except BaseException as error:
            watch.close()
            if directories and isinstance(error, HpcmlpError):
                directories.pop().release()
            raise
        return training

    with np.errstate(all="ignore"):
        Elastic(world, begin).run()


class Training:
    """One run: the loop over the steps, and what is due between them.

    Collective over the parts' communicator. `directory` is None on all ranks but 0. `watch` is told what is done.
    `previous` is the run, on more ranks, that this one takes over from.
    """

    def __init__(self, config: TrainConfig, parts: Parts, directory: Any, watch: Watchdog,
                 previous: "Training | None" = None):
        self.config, self.parts, self.directory, self.watch = config, parts, directory, watch
        self.session, self.step = parts.session, parts.step
        self.console = Console(parts.topology.rank == 0, config.progress)
        self.account = Account(parts, self.console, self._log)
        self.judge = Judge(parts, config.monitor)
        self.forecast: Any = None
        if previous is None:    # what was foretold was for more ranks
            from hpcmlp.run.forecast import Forecast  # when the samples are there: no rank waits for it before
            self.forecast = Forecast(parts)
        self._plan: dict[str, Any] | None = None    # foretold and measured, at the end (rank 0)
        self._parts_s: dict[str, float] = {}        # what a step was spent on, at the end
        self.trace: Any = None
        self._served: list[dict[str, Any]] = []  # what servers did, epoch by epoch (rank 0)
        self._reported = 0      # the step up to which they have told
        self._lost = False      # whether a rank was lost, which no call may wait for
        self.writer: Any = None  # rank 0's, beside the training
        self._save_s = FIRST_SAVE_S + self.session.num_bytes / FIRST_SAVE_RATE  # the longest seen; before: a guess
        self._began = self._started = time.monotonic()
        self._taken_over = False    # from a run on more ranks
        self._news: list[dict[str, Any]] = []   # of ranks that were lost, until the next step is done
        self._said: deque[dict[str, Any]] = deque(maxlen=LAST_SAID if config.elastic else 0)    # to the log, lately
        self._settled = True        # whether all is done that was due after the last step
        self._before: tuple[Any, Any] = replace(self.session.progress), None   # progress and best state before that
        if previous is not None:
            self._take_over(previous)

    def run(self) -> int:
        """Run from the start, the newest checkpoint or where others have died to the end; return the exit code 0."""
        if not self._taken_over:
            self._open(self._restore() if self.config.resume else False)
        # Rank 0's clock alone counts; the control words tell the others.
        limit, whose = self._time_limit() if self.parts.topology.rank == 0 else (None, "")
        with StopFlag(limit, whose) as flag:
            try:
                ended = self._stopped_early() if self._settled else self._after_step(StepResult(), 0, flag)
                self._settled = True
                if not (self._taken_over and ended):
                    self._loop(flag)
            finally:
                self.console.close()
        if not self._lost:
            self._parts_s = self.account.median_parts_s()
            if self.forecast is not None:
                self._plan = self.forecast.compare(self.account, self._parts_s)
        self._finish()
        return 0

    def _time_limit(self) -> tuple[float | None, str]:
        """Return the seconds that are left, and of what: of --time-limit or of the SLURM job, whichever is shorter."""
        spent = time.monotonic() - self._began      # by a run that this one has taken over
        own = None if self.config.time_limit is None else 60.0 * self.config.time_limit - spent
        job = slurm_seconds_left(os.environ)
        if job is None or (own is not None and own <= job):
            return own, "" if own is None else f"the time limit of {self.config.time_limit:g} minutes"
        self.console.line(f"the job ends in {job / 60:.0f} minutes: the run stops and saves before")
        return job, "the end of the SLURM job"

    def _restore(self) -> bool:
        p = self.parts

        def check(meta: dict[str, Any]) -> None:
            if meta["dataset_digest"] != p.manifest.digest():
                raise ConfigError(f"--resume with other data: {self.config.data} is not the data set that the run "
                                  f"started with ({meta['data']}); give that one, or another --out.")
            from hpcmlp.run.directory import check_same_run
            defaults = {f.name: f.default for f in fields(TrainConfig)}
            check_same_run(meta["config"], options(self.config), FREE_ON_RESUME, defaults)
            if p.on_device is not None:
                p.on_device.steps.algorithms = meta.get("algorithms", {})

        found, notes = self.session.restore(self.config.out, check)
        for note in notes:
            self.console.line(f"warning: {note}")
        return found

    def _open(self, restored: bool) -> None:
        p = self.parts
        step = self._reported = self.session.progress.step
        with agreed(p.comm):
            if self.directory is not None:
                self.directory.open_log(step if restored else None)
                self.directory.write("config.toml", to_toml(self.config))
                if restored:
                    self._log({"kind": "event", "event": "resume", "step": step, "ranks": p.topology.size})
                self._open_writer()
        rows = header_rows(p)
        if self.forecast is not None and p.topology.rank == 0:
            rows.append(self.forecast.line())
        self.console.line(header(rows))
        for note in filter(None, (p.exchange.note, p.gpu_note)):
            self.console.line(note)
        if self.config.shard == "params" and not p.sharded:
            self.console.line("shard params has nothing to act on: there is one rank")
        if self.config.overlap and not p.plan.overlap:
            why = "there is one rank" if p.topology.size == 1 else \
                f"sync {p.exchange.name} sends nothing while the ranks compute; give --sync ring or shared"
            self.console.line(f"overlap has nothing to act on: {why}")
        if restored:
            self.console.line(f"resumed at step {step} of {p.total_steps}")
        elif self.config.on_nonfinite == "rollback":
            self._save()  # something to go back to

    def _open_writer(self) -> None:
        from hpcmlp.run.writer import Writer
        self.writer = Writer()
        self.writer.start(self._prepare_saving)

    def _prepare_saving(self) -> None:
        """Do what need not hold up the first save. Local; on the writer's thread."""
        checkpoint_meta(self.parts)
        if not self.parts.sharded:
            self.session.make_room(self.parts.val is not None)

    # ---- survivors of an elastic run

    def _take_over(self, previous: "Training") -> None:
        """Go on where `previous`, on more ranks, was when some of them died. Collective over the survivors."""
        from hpcmlp.run.elastic import hand_over, known_to_any
        self._settled = hand_over(self.parts.comm, previous.session, self.session, previous._settled, previous._before)
        self._before = replace(self.session.progress), self.session.best    # should another die before it is settled
        self._began, self._started = previous._began, previous._started
        self._taken_over = True
        self._said, self._news = previous._said, previous._news
        records = known_to_any(self.parts.comm, self._said)
        if self.directory is not None:
            self.directory.open_log(self.session.progress.step, redo=not self._settled, records=records)
            if previous.writer is not None:
                self.writer = previous.writer   # it may be at work on a copy of its own
            else:
                self._open_writer()

    def lost(self, ranks: list[int], seconds: float) -> None:
        """Tell of ranks that have died, after so many seconds of recovery, once the next step is done. Local."""
        step, size = self.session.progress.step, self.parts.topology.size
        text = f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))} lost after step {step}"
        self.console.line(f"{text}; {size} {'ranks go' if size > 1 else 'rank goes'} on after {1e3 * seconds:.0f} ms")
        self._news.append({"kind": "event", "event": "lost", "step": step, "lost": ranks, "ranks": size,
                           "recovery_s": seconds})

    def comms(self) -> tuple[Any, ...]:
        """Return the communicators besides the parts' own in which ranks may wait for each other. Local."""
        return *self.parts.topology.made, self.parts.exchange.collective.comm

    def abandon(self) -> None:
        """Stop what runs beside the steps, because ranks have died. Local."""
        self.console.close()
        self.watch.close()

    def end(self) -> None:
        """Give everything back that others may see. Local."""
        self.abandon()
        self.end_saving()
        if self.directory is not None:
            self.directory.release()

    # ---- the steps

    def _loop(self, flag: StopFlag) -> None:
        """The steps of the run, each as the design's section 3 has it."""
        c, p, skips = self.config, self.parts, 0
        log = check = False
        mark = self.watch.mark
        fault = None
        if "HPCMLP_FAULT" in os.environ:
            from hpcmlp.run.faults import planned_fault  # tests only
            fault = planned_fault(p.topology.rank)
        if c.trace:
            self._open_trace()
        if p.apart is not None:
            self._loop_apart(flag, fault)
            return
        every = c.checkpoint_every or p.steps_per_epoch
        while (number := self.session.progress.step) < p.total_steps:
            if self.trace is not None and self.trace.begin_step(number):
                self._write_trace()
            begin = time.perf_counter()
            mark(INPUT, number)
            epoch, t = divmod(number, p.steps_per_epoch)
            batch = p.loader.batch(epoch, t) if self.step.takes_batches else None
            mark(STEP, number)
            loaded = time.perf_counter()
            if fault is not None and fault.strike(number, p.strategy.params):
                raise ConfigError("HPCMLP_FAULT act=leave is for workers of --sync server with --staleness above 0.")
            # What is due within a round of local steps waits for its end.
            log |= (number + 1) % c.log_every == 0
            # What is saved has been compared.
            check |= c.replica_check_every > 0 and (number % c.replica_check_every == 0 or (number + 1) % every == 0)
            lr = p.schedule.lr(number) * self.session.progress.lr_factor
            result = self.step.run(batch, number, lr, stop=self._wants_stop(flag),
                                   check=check, want_norm=log)
            if not result.replicas_agree:
                raise replica_error(p.comm, self.step.checksum(), number)
            self.account.count(result, number, epoch, loaded - begin, time.perf_counter() - begin, log)
            if not result.steps:
                continue
            log = check = False
            skips = result.skips_at_end + (skips if result.skipped else 0)
            if c.elastic:
                for news in self._news:     # when the next step after a loss was done, on the clock of this host
                    self._log({**news, "clock_s": time.monotonic()})
                self._news.clear()
                self._settled, self._before = False, (replace(self.session.progress), self.session.best)
            if self._after_step(result, skips, flag):
                break
            self._settled = True
        self._write_trace()

    def _after_step(self, result: Any, skips: int, flag: StopFlag) -> bool:
        """Do what is due after the step just counted: end of epoch, save, stop; return whether the run ends early."""
        c, p, done, stop = self.config, self.parts, self.session.progress.step, result.stop
        final = done == p.total_steps
        most = min(MOST_SKIPS, -(-p.steps_per_epoch // c.local_steps)) if final else MOST_SKIPS
        if judge(c.on_nonfinite, result, skips, most, done, "rounds" if p.local else "steps", self.session.progress):
            self._roll_back(done)
            return False
        ended = self._end_epoch(done // p.steps_per_epoch - 1) if done % p.steps_per_epoch == 0 else False
        last = ended or final
        if last or stop or done % (c.checkpoint_every or p.steps_per_epoch) == 0:
            self._save()
        if last or stop:
            self._finish_save()
        if stop and not last:
            self._write_trace()
            reason = flag.reason or "a signal on another rank"
            raise alike(StoppedAndSaved(f"stopped by {reason} after step {done} of {p.total_steps}; all is saved "
                                        f"in {c.out}: run the same command with --resume to go on."))
        return ended

    def _roll_back(self, done: int) -> None:
        """Go back to the newest saved state whose numbers are finite, with a lower learning rate. Collective."""
        c, before = self.config, self.session.progress
        self._finish_save()
        found, notes = self.session.restore(c.out, lambda meta: None, why_not_good)
        assert found, "a state is saved before the first step"
        progress = self.session.progress
        progress.rollbacks, progress.lr_factor = before.rollbacks + 1, before.lr_factor * ROLLBACK_FACTOR
        progress.seconds, progress.spikes = before.seconds, before.spikes
        with agreed(self.parts.comm):
            if self.directory is not None:
                self.directory.open_log(progress.step)
                self._log({"kind": "event", "event": "rollback", "step": progress.step, "from_step": done,
                           "lr_factor": progress.lr_factor, "reason": "loss or gradient not finite"})
        for text in (*notes, f"step {done} is not finite; back to step {progress.step} with "
                     f"{progress.lr_factor:g} of the learning rate"):
            self.console.line(f"warning: {text}")
        self._save()  # so that it goes on from here, with this rate, whatever comes

    def _end_epoch(self, epoch: int) -> bool:
        """Validate, print and log the epoch; return whether early stopping ends the run."""
        c, p, progress = self.config, self.parts, self.session.progress
        val: dict[str, Any] = {}
        self.watch.mark(VALIDATION, progress.step - 1)
        p.strategy.finish()     # MPI is called below, and parameters under way have a thread inside it
        if p.val is not None and ((epoch + 1) % c.validate_every == 0 or progress.step == p.total_steps):
            val = self.judge.validate()
        self.account.end_epoch(epoch, val)
        if p.roles is not None:
            self._report_servers(epoch + 1)
        if self._stopped_early():
            self.console.line(f"stopped early: {self.judge.monitor} has not improved in {progress.worse} validations")
            self._log({"kind": "event", "event": "early stop", "step": progress.step})
            return True
        return False

    def _wants_stop(self, flag: StopFlag) -> bool:
        """Whether this rank asks all to stop: told to, out of time, or (rank 0) because a save has failed."""
        if self.directory is not None and flag.reason is None and self.directory.stop_asked():
            flag.reason = f"the file {os.path.join(self.config.out, 'stop')}"
        return flag.poll(self._lead_s()) or (self.writer is not None and self.writer.failed)

    def _stopped_early(self) -> bool:
        limit = self.config.early_stopping
        return limit is not None and self.session.progress.worse >= limit

    def _lead_s(self) -> float:
        """Seconds before the time limit at which to stop: for a save under way, the last one, and the ranks to meet."""
        steps = min(self.config.local_steps, self.parts.steps_per_epoch)
        return 2 * self._save_s + steps * self.account.last_step_s + LEAD_MARGIN_S

    def _save(self) -> None:
        """Copy the state and let rank 0's thread write it; a failure of the write before ends all ranks alike."""
        self._finish_save()
        begin = time.perf_counter()
        self.session.progress.seconds += time.monotonic() - self._started
        self._started = time.monotonic()
        if self.parts.sharded:
            # What is gathered array by array cannot be written beside the training: all ranks take part.
            saved = self.session.save(self.config.out, checkpoint_meta(self.parts), self.config.keep)
            if self.writer is not None:
                self.writer.start(lambda: saved)
            return
        state = self.session.capture({} if self.writer is None else checkpoint_meta(self.parts))
        if self.writer is not None:
            from hpcmlp.run import checkpoint
            run_dir, keep, copied_s = self.config.out, self.config.keep, time.perf_counter() - begin
            self.writer.start(lambda: checkpoint.save_timed(run_dir, state, keep, copied_s))

    def _finish_save(self) -> None:
        """Wait for the write under way and log it; a failure ends all ranks alike. Collective."""
        self.watch.mark(SAVE, self.session.progress.step - 1)
        self.parts.strategy.finish()    # see `_end_epoch`
        with agreed(self.parts.comm):
            if self.writer is not None:
                self.writer.wait()
                while saved := self.writer.saved():
                    for one in saved:
                        self._save_s = max(self._save_s, one.copied_s + one.written_s)
                        self._log({"kind": "event", "event": "saved", **asdict(one),
                                   "waited_s": self.writer.waited_s})

    def end_saving(self) -> None:
        """Wait for a write under way where the run ends with a sentence; our own faults do not wait. Local."""
        error = sys.exc_info()[1]
        if self.writer is not None and (error is None or isinstance(error, HpcmlpError)):
            self.writer.wait()

    def _log(self, record: dict[str, Any]) -> None:
        self._said.append(record)
        if self.directory is not None:
            self.directory.log(record)

    # ---- servers and workers out of step

    def _loop_apart(self, flag: StopFlag, fault: Any) -> None:
        """The steps of the run in stretches between meetings; inside one every worker goes at its own pace."""
        c, p, progress = self.config, self.parts, self.session.progress
        every, skips = c.checkpoint_every or p.steps_per_epoch, 0

        def account(number: int, result: StepResult, step_s: float) -> None:
            due = (number + 1) % c.log_every == 0
            self.account.count(result, number, number // p.steps_per_epoch, 0.0, step_s, due)

        def strike(first: int, last: int) -> bool:
            if fault is None:
                return False
            due = fault.step if fault.step is not None and first <= fault.step <= last else last
            return fault.strike(due, p.network.params)

        def tell(number: int, sentence: str) -> None:
            self.console.line(f"warning: {sentence}")
            self._log({"kind": "event", "event": "lost", "step": number, "reason": sentence})

        while progress.step < p.total_steps:
            begin, start = time.perf_counter(), progress.step
            stop = min(p.total_steps, *(start // n * n + n for n in (every, p.steps_per_epoch)))
            came = p.apart.run(start, stop, wants_stop=lambda: self._wants_stop(flag), strike=strike,
                               on_step=account, on_loss=tell)
            if came is None:
                while True:     # This worker has left: the others go on, and one of them ends the job.
                    time.sleep(1.0)
            if self.directory is None:
                self.account.count_stretch(came, time.perf_counter() - begin)
            if came.lost:
                self._go_on_without(came.lost)
            p.strategy.share()
            self._check_replicas()
            skips = came.skips + (skips if came.skips == came.version - start else 0)
            if self._after_step(StepResult(stop=came.stop), skips, flag):
                break

    def _check_replicas(self) -> None:
        """Compare the parameters of all ranks at a meeting. Collective."""
        p = self.parts
        if not self.config.replica_check_every:
            return
        words, checksum = ControlWords(p.comm.size), p.ops.checksum(p.network.params)
        words.put_checksum(checksum)
        messages.sum_in_place(p.comm, words.array)
        if not words.replicas_agree:
            raise replica_error(p.comm, checksum, self.session.progress.step)

    def _go_on_without(self, lost: list[int]) -> None:
        """Make the survivors a world of their own, or save and end where no worker is left. Collective over them."""
        p = self.parts
        self._lost = True
        p.go_on_without(lost)
        if not p.roles.dedicated or not len(p.roles.workers):
            self._save()
            self._finish_save()
            raise alike(StoppedAndSaved("every worker was lost; all is saved up to step "
                                        f"{self.session.progress.step} in {self.config.out}: run the same command "
                                        "with --resume to go on."))
        p.apart.go_on(p.comm, p.roles)

    def _report_servers(self, epoch: int) -> None:
        """Log what the servers did since the last report."""
        from hpcmlp.sync.storage import in_step_report, report_line
        if self.directory is None:
            return
        step = self.session.progress.step
        if self.parts.apart is not None:
            report = self.parts.apart.report()
        else:
            report = in_step_report(self.parts.exchange.collective, step - self._reported)
        self._reported = step
        self._served.append(report)
        self._log({"kind": "server", "epoch": epoch, "step": step, **report})
        self.console.line(report_line(report))

    def end_without_lost(self, world: Any) -> None:
        """End the job where a rank was lost: MPI_Finalize would wait for it for ever. Collective over the survivors.

        Returns only when no rank was lost. The exit code is the one of the exception under way, 0 without one.
        """
        if not self._lost:
            return
        error = sys.exc_info()[1]
        messages.barrier(self.parts.comm)
        if self.parts.topology.rank == 0:
            if isinstance(error, HpcmlpError):
                print(f"hpcmlp: {error}", file=sys.stderr)
            elif error is not None:
                raise error
            end_all(world, getattr(error, "code", 0))
        while True:
            time.sleep(1.0)

    # ---- the timeline

    def _open_trace(self) -> None:
        """Plan to record steps of this run: after a warm-up, but half of a very short run."""
        from hpcmlp.run import trace  # only who asks for it pays for the import
        p, start = self.parts, self.session.progress.step
        first = start + min(trace.WARMUP_STEPS, (p.total_steps - start) // 2)
        stop = min(first + (self.config.trace_steps or trace.DEFAULT_STEPS), p.total_steps)
        others = [(self.judge, "validate", "validation"), (self, "_save", "save")]
        if p.local:
            others += [(self.step, "meet", "meet"), *((self.step.outer, name, f"outer {name}")
                                                      for name in ("reduce", "update", "share", "grad_norm"))]
        self.trace = trace.Recorder(p.comm, self.step, p.loader, first, stop, others)

    def _write_trace(self) -> None:
        """Write what was recorded, if that is still to be done; a failure to write ends all ranks alike. Collective."""
        if self.trace is None:
            return
        lines, name = self.trace.lines(), "trace.json"
        self.trace = None
        with agreed(self.parts.comm):
            if self.directory is not None:
                self.directory.write(name, "\n".join(lines) + "\n")
        self.console.line(f"timeline of all ranks: {os.path.join(self.config.out, name)} (ui.perfetto.dev, "
                          "chrome://tracing)")

    # ---- the end

    def _finish(self) -> None:
        """Evaluate the test split with the best parameters, write the summary and the curves."""
        c, p, progress = self.config, self.parts, self.session.progress
        self.watch.mark(END, progress.step)
        params = self.session.best_params()
        test: dict[str, Any] = {}
        if c.test and p.manifest.rows("test"):
            with agreed(p.comm):
                loader = p.open_loader("test")
            test = self.judge.evaluate(loader, params)
            self.console.line("test " + "  ".join(f"{k} {v:.4f}" for k, v in test.items() if isinstance(v, float)))
        if self._plan is not None:
            from hpcmlp.plan import compare
            self._log({"kind": "plan", **self._plan})
            for line in compare.lines(self._plan):
                self.console.line(line)
        digest = self.session.parameters_sha256(params)
        with agreed(p.comm):
            if self.directory is not None:
                self._write_summary(digest, test)
        if p.local:
            self.console.line(self.step.report(p.exchange.wire))
        self.console.line(f"finished {progress.step} steps in {progress.seconds:.1f} s; run directory {c.out}")

    def _write_summary(self, digest: str, test: dict[str, Any]) -> None:
        from hpcmlp.run.curves import draw_curves  # rank 0 only, at the end
        from hpcmlp.run.directory import to_json
        note = draw_curves([self.config.out], os.path.join(self.config.out, "curves.png"))
        if note:
            self.console.line(note)
        self.directory.write("summary.json",
                             to_json(summary(self.parts, self.account, self._parts_s, digest, test, self._served,
                                             self._plan)) + "\n")


assert {f.name for f in fields(TrainConfig)} >= FREE_ON_RESUME, "FREE_ON_RESUME names options"
