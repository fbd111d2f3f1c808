"""The command line: each command parses, calls one function of the library, and prints.

Data goes to stdout (`--format json`), everything else to stderr. Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import json
import signal
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from hardener import __version__, client, processes
from hardener.errors import DivergedError, HardenerError, UsageError, disk_full, out_of_memory

if TYPE_CHECKING:
    from hardener.console import Narrator
    from hardener.pipeline import Outcome
    from hardener.schemas import Listed

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
recipes_app = typer.Typer(no_args_is_help=True, help="List, print and describe recipes.")
app.add_typer(recipes_app, name="recipes")

RESUMABLE = 2
"""Above this exit code a run did not end by itself, and can go on."""
Format = Literal["human", "json"]
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="Hub id or local folder")]
RecipeOption = Annotated[str | None, typer.Option("--recipe", help="shipped name or YAML file")]
RevisionOption = Annotated[str | None, typer.Option(help="branch, tag or commit of MODEL")]
ProbeOutputOption = Annotated[Path | None, typer.Option("--output", help="run folder; default runs/NAME-RECIPE-probe")]
OutputOption = Annotated[Path | None, typer.Option(help="run folder (new); default runs/NAME-RECIPE")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="override one value of the recipe; repeatable"),
]
DeviceOption = Annotated[Literal["auto", "cpu", "cuda", "mps"], typer.Option(help="where to compute")]
ProbeOption = Annotated[
    Literal["quick", "standard", "thorough"] | None,
    typer.Option("--probe", help="how hard to attack (recipe: probe.preset)"),
]
GateOption = Annotated[
    Literal["no-measurable-protection", "raises-cost", "protected"] | None,
    typer.Option("--fail-under", metavar="WORD", help="exit 1 below this verdict: raises-cost, protected"),
]
FormatOption = Annotated[Format, typer.Option("--format", help="human, or json on stdout")]
DebugOption = Annotated[bool, typer.Option("--debug", help="show the traceback of an error")]
PrivateOption = Annotated[bool, typer.Option("--private", help="leave the target repository private")]
CreatePrOption = Annotated[bool, typer.Option("--create-pr", help="push as a pull request")]
BranchOption = Annotated[str | None, typer.Option(help="push to this branch")]
TagOption = Annotated[str | None, typer.Option(help="tag the published commit")]
SignOption = Annotated[
    str | None,
    typer.Option("--sign", metavar="KEY", help="sign the release: a private key (PEM), or sigstore for a CI identity"),
]
PushAnywayOption = Annotated[
    bool,
    typer.Option("--push-anyway", help="publish although the evidence forbids it; the card then says so first"),
]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="never ask")]
OnOption = Annotated[
    Literal["hf-jobs"] | None, typer.Option("--on", help="run this command as a Job on the Hub, and follow it")
]
FlavorOption = Annotated[str | None, typer.Option(help="with --on: the Hub's machine; default a10g-small")]
TimeoutOption = Annotated[str | None, typer.Option(help="with --on: the Job ends after so long; default 12h")]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version and stop")
    ] = False,
) -> None:
    """Harden open weights against fine-tuning for misuse, prove it by attack, publish the evidence.

    hardener harden org/model --recipe ctrap --push-to org/model-hardened
    """


@app.command()
def harden(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="Hub id or local folder")] = None,
    recipe: RecipeOption = None,
    revision: RevisionOption = None,
    output: OutputOption = None,
    push_to: Annotated[str | None, typer.Option(metavar="REPO", help="publish there if the evidence allows it")] = None,
    private: PrivateOption = False,
    create_pr: CreatePrOption = False,
    branch: BranchOption = None,
    tag: TagOption = None,
    sign: SignOption = None,
    card_template: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Jinja template of the card, in place of the shipped one")
    ] = None,
    set_: SetOption = None,
    device: DeviceOption = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the plan and stop; no weights are fetched")] = False,
    resume: Annotated[Path | None, typer.Option(metavar="RUN", help="go on with an interrupted run")] = None,
    from_report: Annotated[
        str | None, typer.Option(metavar="RELEASE", help="repeat the hardening of a release, its folder or Hub id")
    ] = None,
    push_anyway: PushAnywayOption = False,
    yes: YesOption = False,
    probe_preset: ProbeOption = None,
    fail_under: GateOption = None,
    num_processes: Annotated[
        int, typer.Option(min=1, metavar="N", help="processes that compute together, one per GPU")
    ] = 1,
    shard: Annotated[
        bool, typer.Option("--shard", help="spread the weights over the processes (FSDP2), as against a copy in each")
    ] = False,
    on: OnOption = None,
    flavor: FlavorOption = None,
    timeout: TimeoutOption = None,
    format: FormatOption = "human",
    debug: DebugOption = False,
) -> None:
    """Harden a model, attack the result, write its card, and push it.

    hardener harden org/model --recipe ctrap --dry-run

    hardener harden ./checkpoint --recipe my.yaml --set train.steps=500 --fail-under raises-cost

    hardener harden --resume runs/org--model-ctrap

    hardener harden --from-report org/model-hardened
    """
    from hardener import pipeline

    narrator = _narrator(format)
    world = processes.world()
    if push_to and not dry_run and not yes and world.size == 1:
        _confirm(f"Publish to {push_to} if the evidence allows it?")
    asked: dict[str, Any] = {
        "recipe": recipe,
        "overrides": [*(set_ or ()), *_as_overrides(probe_preset, fail_under)],
        "revision": revision,
        "output": output,
        "push_to": push_to,
        "private": private,
        "create_pr": create_pr,
        "branch": branch,
        "tag": tag,
        "sign": sign,
        "card_template": card_template,
        "device": device,
        "resume": resume,
        "from_report": from_report,
        "push_anyway": push_anyway,
    }
    machine = {name: value for name, value in (("flavor", flavor), ("timeout", timeout)) if value is not None}
    if shard and world.size == num_processes == 1:
        raise UsageError("--shard spreads weights over several processes; add --num-processes, or leave it out")
    if on is not None:
        there = {"num_processes": num_processes, "shard": shard}
        _as_job(model, {**asked, **machine, **there}, dry_run, format, narrator)
    if machine:
        raise UsageError("--flavor and --timeout are those of a Job; add --on hf-jobs, or leave them out")
    if num_processes > 1 and world.size == 1 and not dry_run:
        raise typer.Exit(processes.launch(num_processes, [*sys.argv[1:], "--yes"]))
    world.shard = world.size > 1 and (shard or world.shard)
    _finish(pipeline.harden(model, **asked, dry_run=dry_run, narrator=narrator, world=world), format, narrator)


@app.command()
def probe(
    model: ModelArgument,
    recipe: Annotated[str, typer.Option("--recipe", help="shipped name or YAML file; its defense is not used")],
    against: Annotated[str | None, typer.Option(metavar="ORIGINAL", help="the unhardened model, for a verdict")] = None,
    revision: RevisionOption = None,
    output: ProbeOutputOption = None,
    set_: SetOption = None,
    device: DeviceOption = "auto",
    probe_preset: ProbeOption = None,
    fail_under: GateOption = None,
    format: FormatOption = "human",
    debug: DebugOption = False,
) -> None:
    """Attack any checkpoint, also one that others hardened.

    hardener probe org/model-hardened --against org/model --recipe ctrap

    hardener probe ./checkpoint --recipe my.yaml --probe quick
    """
    from hardener import pipeline

    narrator = _narrator(format)
    outcome = pipeline.probe(
        model,
        recipe=recipe,
        against=against,
        overrides=[*(set_ or ()), *_as_overrides(probe_preset, fail_under)],
        revision=revision,
        output=output,
        device=device,
        narrator=narrator,
    )
    _finish(outcome, format, narrator)


@app.command()
def card(
    run: Annotated[Path, typer.Argument(metavar="RUN")],
    template: Annotated[Path | None, typer.Option(metavar="FILE", help="Jinja template, from now on")] = None,
    debug: DebugOption = False,
) -> None:
    """Render the card and plots of a finished run again, and print the card.

    hardener card runs/org--model-ctrap
    """
    from hardener import release

    print(release.card_run(run, template))


@app.command()
def push(
    run: Annotated[Path, typer.Argument(metavar="RUN")],
    repo: Annotated[str, typer.Argument(metavar="REPO")],
    private: PrivateOption = False,
    create_pr: CreatePrOption = False,
    branch: BranchOption = None,
    tag: TagOption = None,
    sign: SignOption = None,
    push_anyway: PushAnywayOption = False,
    yes: YesOption = False,
    format: FormatOption = "human",
    debug: DebugOption = False,
) -> None:
    """Push the release of a finished run: one commit or nothing, verified afterwards.

    hardener push runs/org--model-ctrap org/model-hardened --create-pr
    """
    from dataclasses import asdict

    from hardener import release

    if not yes:
        _confirm(f"Publish {run} to {repo}?")
    pushed = release.push_run(
        run,
        repo,
        private=private,
        create_pr=create_pr,
        branch=branch,
        tag=tag,
        push_anyway=push_anyway,
        sign=sign,
    )
    print(json.dumps(asdict(pushed), indent=1) if format == "json" else pushed.pr_url or pushed.url)


@app.command()
def verify(
    release: Annotated[str, typer.Argument(metavar="FOLDER|REPO", help="a release folder or a Hub id")],
    revision: RevisionOption = None,
    public_key: Annotated[
        Path | None, typer.Option(metavar="PEM", help="the key by which the release must be signed")
    ] = None,
    identity: Annotated[str | None, typer.Option(help="who must have signed it keylessly, with --issuer")] = None,
    issuer: Annotated[str | None, typer.Option(metavar="URL", help="who vouches for --identity")] = None,
    re_probe: Annotated[bool, typer.Option("--re-probe", help="attack it again and compare")] = False,
    set_: SetOption = None,
    device: DeviceOption = "auto",
    format: FormatOption = "human",
    debug: DebugOption = False,
) -> None:
    """Check that everything in a release agrees, and who signed it; exit 1 if it does not.

    hardener verify org/model-hardened --public-key signer.pem

    hardener verify runs/org--model-ctrap/release --re-probe
    """
    from hardener import verification

    narrator = _narrator(format)
    result = verification.verify(
        release,
        revision=revision,
        re_probe=re_probe,
        overrides=set_ or (),
        device=device,
        public_key=public_key,
        identity=identity,
        issuer=issuer,
        narrator=narrator,
    )
    if format == "json":
        print(json.dumps(result, indent=1, ensure_ascii=False))
    else:
        for name, finding in result["checks"].items():
            narrator.note(f"{name:<12} {finding}")


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="folder for everything the demo makes")] = Path("demo"),
    format: FormatOption = "human",
    debug: DebugOption = False,
) -> None:
    """Train a tiny model, harden it with CTRAP, attack it, and show what the gate would say. Ends with 0.

    hardener demo
    """
    from hardener import demo as demonstration

    narrator = _narrator(format)
    outcome = demonstration.run(output, narrator)
    _show(outcome, format, narrator)


@app.command()
def schema(
    command: Annotated[
        Literal["harden", "probe", "demo", "push", "job", "verify", "recipes-list", "report"],
        typer.Argument(metavar="COMMAND", help="harden, probe, demo, push, verify, recipes-list; job, or report"),
    ],
    debug: DebugOption = False,
) -> None:
    """Print the JSON schema of what a command prints with `--format json`, or of report.json.

    hardener schema harden > outcome.schema.json
    """
    from hardener import schemas

    print(json.dumps(schemas.schema(command), indent=1, ensure_ascii=False))


@recipes_app.command("list")
def recipes_list(format: FormatOption = "human", debug: DebugOption = False) -> None:
    """List the shipped recipes.

    hardener recipes list
    """
    import yaml

    from hardener.resources import recipes

    # They are known to be valid; to check them again would take longer than everything else here.
    found = [yaml.safe_load(path.read_text("utf-8")) for path in recipes().values()]
    listed: list[Listed] = [{"name": one["name"], "title": one["title"], "task": one["task"]} for one in found]
    if format == "json":
        print(json.dumps(listed, indent=1))
        return
    for one in listed:
        print(f"{one['name']:<22} {one['task']:<25} {one['title']}")


@recipes_app.command("show")
def recipes_show(
    name: str,
    resolved: Annotated[bool, typer.Option("--resolved", help="every default written out")] = False,
    debug: DebugOption = False,
) -> None:
    """Print a recipe, with its comments.

    hardener recipes show ctrap > my.yaml
    """
    from hardener.resources import recipes

    own = recipes().get(name)
    if own is not None and not resolved:
        print(own.read_text("utf-8"), end="")
        return
    from hardener import recipe_file

    print(recipe_file.dump(recipe_file.load(name)), end="")


@recipes_app.command("schema")
def recipes_schema(debug: DebugOption = False) -> None:
    """Print the JSON schema of recipes.

    hardener recipes schema > recipe.schema.json
    """
    from hardener import recipe_file

    print(json.dumps(recipe_file.schema(), indent=1, ensure_ascii=False))


def _as_overrides(preset: str | None, gate: str | None) -> list[str]:
    """Flags that are keys of the recipe."""
    return [f"probe.{key}={value}" for key, value in (("preset", preset), ("gate", gate)) if value is not None]


def _as_job(model: str | None, asked: dict[str, Any], dry_run: bool, format: Format, narrator: Narrator) -> NoReturn:
    """Print the request of a Job, or send it and end as it ends."""
    from dataclasses import asdict

    from hardener import jobs

    request = jobs.request(model, **asked)
    if dry_run:
        print(json.dumps(request, indent=1))
        raise typer.Exit
    ended = jobs.submit(request, narrator)
    if format == "json":
        print(json.dumps(asdict(ended), indent=1))
    raise typer.Exit(ended.exit_code)


def _narrator(format: Format) -> Narrator:
    from hardener.console import Narrator

    return Narrator()


def _confirm(question: str) -> None:
    """Ask on a terminal; elsewhere the command itself is the consent."""
    if sys.stdin.isatty() and sys.stderr.isatty() and not typer.confirm(question, err=True):
        raise UsageError("not confirmed; nothing was started")


def _show(outcome: Outcome, format: Format, narrator: Narrator) -> None:
    from hardener import pipeline, plan, terminal

    if format == "json":
        print(pipeline.as_json(outcome))
    if outcome.report is None:
        for name, value in plan.lines(outcome.plan):
            narrator.note(f"{name:<9} {value}")
        return
    terminal.show(outcome.report, narrator.console)
    if outcome.run is not None:
        narrator.note(f"Card and evidence: {outcome.run / 'release' / 'README.md'}")
    if outcome.pushed is not None:
        narrator.note(f"Published: {outcome.pushed.pr_url or outcome.pushed.url}")
        word = outcome.report.evidence.word if outcome.report.evidence else ""
        if word not in ("raises cost", "protected"):
            narrator.warn("This publishes a checkpoint for which no protection was measured.")
    if outcome.withheld is not None:
        narrator.warn(f"Not pushed: {outcome.withheld}. Publish it all the same with --push-anyway.")


def _finish(outcome: Outcome, format: Format, narrator: Narrator) -> None:
    _show(outcome, format, narrator)
    raise typer.Exit(outcome.exit_code)


class Interrupted(BaseException):
    """SIGINT or SIGTERM arrived. No KeyboardInterrupt, which Typer would take for its own."""

    def __init__(self, number: int) -> None:
        self.number = number


def main() -> None:
    """Run the command line and end with an exit code of `errors.py`, or with 128 + the number of a signal."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    place = processes.place()
    try:
        _check_words(sys.argv[1:])
        _take_part(processes.world())
    except (Exception, Interrupted) as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a launcher ends whoever is left; this one ends by itself
        code, text = _told(error)
        if place and isinstance(error, (DivergedError, Interrupted)):
            sys.exit(code)  # the first process says it
        if staying := getattr(error, "staying", None):  # a repository that was made for the run
            text += f"\n{staying}"
        go_on = getattr(error, "go_on", None)  # known once there is a run folder
        if go_on is not None and code > RESUMABLE:
            text += f"\n{go_on}"
        if "--debug" in sys.argv:
            print(client.scrub("".join(traceback.format_exception(error))), file=sys.stderr, end="")
        print(f"hardener{f' (process {place})' if place else ''}: {text}", file=sys.stderr)
        sys.exit(code)


def _take_part(world: processes.World) -> None:
    """The first process runs the command; the others do what it orders."""
    if world.rank:
        from hardener import followers

        followers.follow(world)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return
    try:
        app()
    except SystemExit:  # its end, whatever the exit code; where it fails, the launcher ends the others
        world.dismiss()
        raise


def _check_words(words: list[str]) -> None:
    """Raise UsageError for a token among the words of a command, before anything shows or keeps it."""
    if place := next((place for place, word in enumerate(words, 1) if client.TOKEN.search(word)), None):
        raise UsageError(f"word {place} of the command holds a token; {client.MISPLACED}")


def _interrupt(number: int, _: object) -> None:
    raise Interrupted(number)


def _told(error: BaseException) -> tuple[int, str]:
    """Exit code and words of whatever ended a command."""
    if isinstance(error, HardenerError):
        return error.exit_code, str(error)
    if isinstance(error, Interrupted):
        return 128 + error.number, "interrupted"
    if out_of_memory(error):
        return (
            5,
            f"out of memory ({error}); lower train.batch_size or raise train.grad_accumulation, in the probe lower "
            "probe.batch_size",
        )
    if disk_full(error):
        return 5, f"{error}; free some space, or set TMPDIR or HF_HOME to another disk"
    return HardenerError.exit_code, (
        f"this is a bug in hardener: {type(error).__name__}: {client.scrub(str(error))}\n"
        "Please report it with what the same line shows with --debug"
    )


if __name__ == "__main__":
    main()
