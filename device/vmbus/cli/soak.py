"""The command `soak`: a campaign of random workloads and operations, its progress, its report."""

from __future__ import annotations

import asyncio
import datetime
import json
import secrets
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import click
import msgspec

from vmbus.cli.results import Failure, json_option, print_failure
from vmbus.cli.terminal import console, heeded
from vmbus.errors import EnvironmentProblem, UsageError, VmbusError
from vmbus.provision import provision, provision_debian
from vmbus.soak import report as reports
from vmbus.soak.campaign import CampaignRun, Limits
from vmbus.soak.engine import Engine, LocalEngine
from vmbus.soak.entries import located
from vmbus.soak.environment import describe_environment
from vmbus.soak.episode import scratch_base
from vmbus.soak.expected import Budget, Expected, broken, parse_budget
from vmbus.soak.folder import CAMPAIGN_FILE, Campaign, CampaignFolder, read_campaign
from vmbus.soak.job import Job
from vmbus.soak.machines import description_of
from vmbus.soak.measures import MEASURES, parse
from vmbus.soak.plan import encode_plan
from vmbus.soak.progress import Goal, LiveView, PlainView, View, failure_text
from vmbus.soak.records import FORMAT, Report
from vmbus.soak.replay import parse_words, replay_command
from vmbus.soak.schedule import check_own, episodes_planned, linux_share, plan_episode
from vmbus.soak.settings import Settings, read_values, settings_from
from vmbus.vm.command_line import programs_from

PASSED, FAILED, CANNOT, INTERRUPTED = 0, 1, 2, 3
"""Exit statuses. CANNOT: it could not begin, or there is nothing to report."""
T = TypeVar("T")
STATUS = {"passed": PASSED, "failed": FAILED, "interrupted": INTERRUPTED}


def _reads(read: Callable[[str], T]) -> Callable[[str], T]:
    """The type of an option: what a function makes of its text. The function's ValueError says what is wrong."""

    def convert(text: str) -> T:
        try:
            return read(text)
        except ValueError as error:
            raise click.BadParameter(str(error)) from error

    return convert


_SECONDS = _reads(lambda text: parse(text, "time"))
_SHARE = _reads(lambda text: parse(text.removesuffix("%"), "number") / 100)


def _budget_options(command: Callable[..., None]) -> Callable[..., None]:
    """An option for each measure that can be bounded."""
    for name, measure in reversed(MEASURES.items()):
        bound = "at most" if measure.side == "max" else "at least"
        command = click.option(
            f"--{measure.side}-{name}", multiple=True, metavar="[KIND=]LIMIT",
            type=_reads(partial(parse_budget, name)),
            help=f"Failed unless the {measure.text} is {bound} this.",
        )(command)  # fmt: skip
    return command


@click.command()
@click.option("--seed", type=click.IntRange(0), help="All of the schedule follows from it (default: one is drawn).")
@click.option("--operations", type=click.IntRange(1), metavar="N", help="Carry out N operations (default: 100).")
@click.option(
    "--seconds", "--for", metavar="TIME", type=_SECONDS, help="Instead, begin episodes for so long: 90, 20m, 8h."
)
@click.option("--report", "folder", type=click.Path(path_type=Path, file_okay=False), metavar="DIR",
              help="The campaign's folder; one that was interrupted is gone on with (default: soak-SEED).")  # fmt: skip
@click.option(
    "--schedule", type=click.Path(path_type=Path, dir_okay=False), help="Settings from this TOML or JSON file."
)
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="One setting, such as weights.clone=0.")
@click.option("--episode", type=click.IntRange(0), metavar="I", help="Only this episode: replays a failure.")
@click.option(
    "--parallel", type=click.IntRange(1, 256), metavar="N", help="VMs side by side (default: as the machine allows)."
)
@click.option("--scheduler", metavar="ADDRESS", help="Run the episodes on the machines of this Dask scheduler.")
@click.option("--max-failures", default=Limits().failures, show_default=True, type=click.IntRange(1), metavar="N",
              help="End after N failed episodes.")  # fmt: skip
@click.option("--keep", default=Limits().keep_bytes >> 20, show_default=True, type=click.IntRange(1), metavar="MIB",
              help="Keep so much of each failure, and eight times that of all.")  # fmt: skip
@click.option("--resume", is_flag=True, help="Go on with the campaign in DIR, with its own settings.")
@click.option("--plan", "only_plan", is_flag=True, help="Print the schedule, an episode a line, and do nothing.")
@click.option("--report-only", is_flag=True, help="Only make the report of DIR anew.")
@_budget_options
@click.option("--compare", type=click.Path(path_type=Path), metavar="PATH",
              help="Show medians beside those of an earlier campaign: its report.json, or its folder.")  # fmt: skip
@click.option("--max-growth", "growth", metavar="PERCENT", type=_SHARE,
              help="Failed if a median is so much above that of --compare.")  # fmt: skip
@json_option
def soak(
    seed: int | None,
    operations: int | None,
    seconds: float | None,
    folder: Path | None,
    schedule: Path | None,
    assignments: tuple[str, ...],
    episode: int | None,
    parallel: int | None,
    scheduler: str | None,
    max_failures: int,
    keep: int,
    resume: bool,
    only_plan: bool,
    report_only: bool,
    compare: Path | None,
    growth: float | None,
    as_json: bool,
    **bounds: tuple[Budget, ...],
) -> None:
    """Run random workloads and operations on VMs for long, and prove that no packet was lost.

    DIR gets report.html, report.json and junit.xml. The exit status is 0 if all has passed, 1 if something has failed,
    2 if the campaign could not begin, 3 if it was interrupted: then the same command goes on with it.
    """
    try:
        expected = Expected.of(list(chain(*bounds.values())), compare, growth)
        if report_only:
            if expected is not None:
                expected.check(_of_folder(_needed(folder))[0].kinds)
                expected.write(_needed(folder))
            sys.exit(_show(reports.write(_needed(folder)), _needed(folder), as_json))
        if resume:
            if any(one is not None for one in (seed, operations, seconds, schedule, episode)) or assignments:
                raise UsageError("--resume takes the settings of the folder: leave --seed, --operations and so on away")
            settings, episode = _of_folder(_needed(folder))
        else:
            settings = _settings(seed, operations, seconds, schedule, assignments, folder)
        if expected is not None:
            expected.check(settings.kinds)
        if only_plan:
            _print_plan(settings, episode)
            return
        planned = episodes_planned(settings)
        if episode is not None and planned is not None and episode >= planned:
            raise UsageError(f"there is no episode {episode}: the campaign has {planned} of them, from 0")
        plan_episode(settings, settings.seed, episode or 0)
        check_own(settings)
        folder = folder or Path(f"soak-{settings.seed}")
        limits = Limits(seconds=settings.seconds, failures=max_failures, keep_bytes=keep << 20)
        asyncio.run(_campaign(settings, folder, episode, limits, parallel, scheduler, expected))
        status = _show(reports.build(folder), folder, as_json)
    except (VmbusError, OSError) as error:
        print_failure(Failure.of(error, CANNOT), as_json)
        sys.exit(CANNOT)
    except KeyboardInterrupt:
        print_failure(Failure("interrupted", "interrupted", "", INTERRUPTED), as_json, lead="")
        sys.exit(INTERRUPTED)
    sys.exit(status)


def _needed(folder: Path | None) -> Path:
    if folder is None:
        raise UsageError("which campaign? name its folder with --report DIR")
    return folder


def _of_folder(folder: Path) -> tuple[Settings, int | None]:
    """The settings of the campaign there, and its only episode."""
    known = read_campaign(folder)
    return settings_from(known.settings, str(folder / CAMPAIGN_FILE)), known.only


def _settings(
    seed: int | None,
    operations: int | None,
    seconds: float | None,
    schedule: Path | None,
    assignments: tuple[str, ...],
    folder: Path | None,
) -> Settings:
    """From the schedule file, then the command line. Without a seed: that of the folder, or a new one."""
    values: dict[str, Any] = {} if schedule is None else read_values(schedule)
    values = parse_words(values, assignments)
    if operations is not None:
        values = {**values, "operations": operations, "seconds": None}
    if seconds is not None:
        values = {**values, "seconds": seconds, "operations": None}
    if operations is not None and seconds is not None:
        raise UsageError("--operations and --seconds exclude each other")
    if seed is not None:
        values["seed"] = seed
    elif "seed" not in values:
        there = folder is not None and (folder / CAMPAIGN_FILE).exists()
        values["seed"] = read_campaign(folder).seed if folder is not None and there else secrets.randbelow(1 << 31)
    return settings_from(located(values, Path.cwd()), "settings" if schedule is None else str(schedule))


def _print_plan(settings: Settings, episode: int | None) -> None:
    planned = episodes_planned(settings)
    for index in [episode] if episode is not None else range(10 if planned is None else planned):
        click.echo(json.dumps(json.loads(encode_plan(plan_episode(settings, settings.seed, index)))))


class _Row:
    """The episodes of these settings, as jobs."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    @property
    def planned(self) -> int | None:
        return episodes_planned(self._settings)

    def job(self, episode: int) -> Job:
        plan = plan_episode(self._settings, self._settings.seed, episode)
        return Job(episode=episode, seed=plan.seed, plan=encode_plan(plan))


async def _campaign(
    settings: Settings,
    path: Path,
    episode: int | None,
    limits: Limits,
    parallel: int | None,
    scheduler: str | None,
    expected: Expected | None,
) -> None:
    """Run the campaign in its folder and show how it goes."""
    if (path / CAMPAIGN_FILE).exists():
        read_campaign(path)  # whether it can be gone on with at all, before anything is set up
    if scheduler is None and description_of(settings.description).guest.root:
        await asyncio.to_thread(provision_debian)  # takes longer, the first time, than a worker may be silent
    provisioned = await asyncio.to_thread(provision)
    wanted = linux_share(settings) > 0
    if episode is not None:
        wanted = plan_episode(settings, settings.seed, episode).vm.guest.linux
    reason = programs_from(provisioned).no_linux_driver
    if wanted and reason and scheduler is None:
        raise EnvironmentProblem(
            f"Linux's own drivers cannot be used here: {reason}; --set linux=0 leaves out the episodes that have them"
        )
    row = _Row(settings)
    plain: dict[str, Any] = msgspec.to_builtins(settings)
    campaign = Campaign(
        format=FORMAT,
        seed=settings.seed,
        started=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        settings=plain,
        environment=describe_environment(provisioned),
        episodes_planned=1 if episode is not None else row.planned,
        only=episode,
    )
    engine = await _engine(parallel, scheduler)
    try:
        folder = CampaignFolder.open(path, campaign)
    except BaseException:
        await engine.close()
        raise
    with ExitStack() as stack:
        stack.callback(folder.close)
        if expected is not None:
            folder.with_room(lambda: expected.write(path))
        there = folder.campaign.environment.project
        if there != campaign.environment.project:
            folder.problems.append(
                f"the campaign was begun with version {there}, this is {campaign.environment.project}: "
                "the same seed may be another schedule now"
            )
        title = f"soak: seed {settings.seed}, {engine.description}, into {path}"
        total = (
            len(plan_episode(settings, settings.seed, episode).operations) if episode is not None else settings.total
        )
        goal = Goal(total, settings.seconds, before=folder.state.ran)
        view: View
        if console.is_terminal:
            view = LiveView(console, title, str(path), goal)
        else:
            view = PlainView(_print_line, str(path), goal)
            _print_line(title)
        stack.enter_context(view)
        run = CampaignRun(
            folder,
            row,
            engine,
            view,
            limits=limits,
            scratch=None if scheduler else scratch_base(),
            replay=lambda index: replay_command(plain, index, path),
            report=lambda: reports.write(path),
        )
        _on_signals(run)
        try:
            await run.run()
        finally:
            await engine.close()


async def _engine(parallel: int | None, scheduler: str | None) -> Engine:
    if scheduler is None:
        return LocalEngine(parallel)
    from vmbus.soak.dask import DaskEngine

    return await DaskEngine.connect(scheduler, parallel)


def _on_signals(run: CampaignRun) -> None:
    """The first signal ends the campaign in good order, the second at once."""
    signals = 0

    def on_signal(number: signal.Signals) -> None:
        nonlocal signals
        signals += 1
        if signals == 1:
            run.interrupt(f"interrupted by {number.name}")
        else:
            run.abort()

    for number in heeded(signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, on_signal, number)


def _print_line(text: str) -> None:
    # click's echo, not rich: lines are never wrapped, and a log gets them at once.
    click.echo(text, err=True)


def _show(report: Report, folder: Path, as_json: bool) -> int:
    """Print the verdict, and how to see each failure again. Returns the exit status."""
    if as_json:
        click.echo(reports.encode(report))
        return STATUS[report.verdict]
    for failure in report.failures:
        kept = f"{folder}/{failure.kept}" if failure.kept else ""
        click.echo(failure_text(failure.episode, failure.message, kept, failure.replay))
    lines = broken(report)
    for text in lines:
        click.echo(f"BROKEN  {text}")
    for text in report.missing:
        click.echo(f"missing: {text}")
    kinds = ", ".join(f"{sum(count.values())} {kind}" for kind, count in report.by_kind.items())
    click.echo(
        f"{report.verdict.upper()}  seed {report.seed}: {report.operations} operations in {report.seconds:.0f} s"
        + (f" ({kinds})" if kinds else "")
        + f"; {report.packets} packets carried over, {report.transactions} transactions exactly once; "
        f"{len(report.failures)} failures{f', {len(lines)} bounds broken' if lines else ''}\n"
        f"report: {folder / reports.HTML_NAME}"
    )
    return STATUS[report.verdict]
