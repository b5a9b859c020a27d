"""The command ``stillhouse``.

Heavy libraries are imported inside the commands: ``stillhouse --help`` answers at once. Data goes to stdout, progress and
errors to stderr; what a user is meant to read comes without a traceback.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from stillhouse.jobs.cli.say import JsonOption, say
from stillhouse.jobs.cli.teachers import fault_server, list_teachers
from stillhouse.jobs.cli.traces import traces_app
from stillhouse.jobs.cli.verify import verify
from stillhouse.jobs.environment import PROCESS_ENVIRONMENT, settle_environment
from stillhouse.pipeline.errors import ExitCode, StillhouseError

app = typer.Typer(
    name="stillhouse",
    help="Distil a large reasoning model into a small one: verified traces, LoRA over 4-bit weights, a validated 4-bit "
    "checkpoint.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
bench_app = typer.Typer(help="Measure speed against named peers.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(bench_app, name="bench")
app.add_typer(traces_app, name="traces")
# Typer brings a click of its own along, or not, by version: the base of what it raises for wrong usage is found from here.
USAGE_ERRORS = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")

RecipeArgument = Annotated[str, typer.Argument(help="A shipped recipe's name (see `stillhouse recipes`) or a YAML file.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="Override a key: --set train.num_steps=50. Repeatable.")]
OutOption = Annotated[Path | None, typer.Option("--out", help="The run's folder. Default: runs/<recipe's name>.")]
AddressOption = Annotated[str | None, typer.Option("--address", help="Ray cluster to join. Default: a local Ray.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]

OUTCOMES = (
    "Exit codes: 0 pass, 1 gate failed or nothing kept, 2 usage or recipe, 3 inconclusive, 4 infrastructure, 5 integrity, "
    "130 interrupted."
)


def _recipe(name: str, overrides: list[str] | None) -> Any:
    from stillhouse.jobs.recipe import load_recipe

    return load_recipe(name, overrides or ())


def _walk(
    command: str, recipe: str, overrides: list[str] | None, out: Path | None, address: str | None, quiet: bool, as_json: bool
) -> int:
    """Run a recipe's stages for one command and print what came of it; returns the exit code."""
    loaded = _recipe(recipe, overrides)
    from stillhouse.jobs.progress import make_reporter
    from stillhouse.jobs.runner import run_recipe

    folder = out or Path("runs", loaded.name)
    report = run_recipe(loaded, folder, make_reporter(quiet=quiet), address=address, command=command)
    if report is None:
        manifests = sorted(Path(folder, "stages").glob("*.json"), key=lambda path: path.stat().st_mtime)
        stages = {path.stem: json.loads(path.read_text())["counts"] for path in manifests}
        if as_json:
            say(json.dumps({"run": str(folder), "stages": stages}, indent=2))
        else:
            from stillhouse.jobs.status import counts_text, read_status

            for name, counts in stages.items():
                say(f"{name:12} {counts_text(counts)}")
            say(f"{'cost':12} {read_status(folder).cost.line()}")
        return int(ExitCode.PASS)
    if as_json:
        say(report.model_dump_json(indent=2))
    else:
        from stillhouse.pipeline.report import summary_table

        say(summary_table(report))
        say(f"\nreport      {folder / 'report.html'}\ncheckpoint  {folder / report.checkpoint}")
    return int(report.exit_code)


def _stage_command(command: str, help_text: str) -> None:
    def call(
        recipe: RecipeArgument,
        overrides: SetOption = None,
        out: OutOption = None,
        address: AddressOption = None,
        quiet: QuietOption = False,
        as_json: JsonOption = False,
    ) -> int:
        return _walk(command, recipe, overrides, out, address, quiet, as_json)

    app.command(command, help=help_text, epilog=OUTCOMES)(call)


_stage_command("run", "Distil: all stages. The same command goes on after a stop.")
_stage_command("generate", "Let the teacher write the traces that are missing.")


@app.command("filter", epilog=OUTCOMES)
def filter_traces(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    out: OutOption = None,
    address: AddressOption = None,
    explain: Annotated[
        str | None, typer.Option("--explain", metavar="TRACE", help="Tell one trace's way; its key, or how it begins.")
    ] = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> int:
    """Verify and select traces; costs no teacher token."""
    if explain is None:
        return _walk("filter", recipe, overrides, out, address, quiet, as_json)
    from dataclasses import asdict

    from stillhouse.jobs.filtering import explain as way_of

    verdicts = way_of(out or Path("runs", _recipe(recipe, overrides).name), explain)
    if as_json:
        say(json.dumps([asdict(verdict) for verdict in verdicts], indent=2))
        return int(ExitCode.PASS)
    say(verdicts[0].trace_key)
    for verdict in verdicts:
        said = ("would keep" if verdict.keep else "would drop") if verdict.shadow else "keeps" if verdict.keep else "drops"
        say(f"{verdict.check:20} {said:11} {verdict.reason}" + (f": {verdict.evidence}" if verdict.evidence else ""))
    return int(ExitCode.PASS)


_stage_command("train", "Render checked examples and train the adapter.")
_stage_command("quantize", "Merge the adapter and write the 4-bit checkpoint.")
_stage_command("validate", "Measure the emitted checkpoint and let the gate judge.")
_stage_command("report", "Judge again and write report.json and report.html.")


@app.command(epilog="Exit codes: 0 sound, 5 not what its manifest says.")
def check(
    folder: Annotated[Path, typer.Argument(help="A checkpoint folder.")],
    as_json: JsonOption = False,
) -> int:
    """Check the files of an emitted checkpoint.

    Files, manifest, safetensors headers, shapes, scales and tokenizer; no model is run.
    """
    from dataclasses import asdict

    from stillhouse.pipeline.errors import RecipeError
    from stillhouse.pipeline.integrity import check_checkpoint

    if (folder / "checkpoint").is_dir() and not (folder / "manifest.json").exists():
        raise RecipeError(f"{folder} is a run's folder; check {folder / 'checkpoint'}")
    if not folder.is_dir():
        raise RecipeError(f"{folder} is not a folder; give one that `stillhouse quantize` wrote")
    report = check_checkpoint(folder)
    if as_json:
        say(json.dumps(asdict(report), indent=2))
    else:
        say("\n".join(report.problems) or f"{folder} is sound: {report.files} files, {report.tensors} tensors")
    return int(ExitCode.PASS if report.ok else ExitCode.INTEGRITY)


@app.command()
def recipes(as_json: JsonOption = False) -> int:
    """List the shipped recipes."""
    from stillhouse.jobs.recipe import shipped_recipes

    found = shipped_recipes()
    if as_json:
        say(json.dumps(found, indent=2))
    else:
        width = max(map(len, found))
        say("\n".join(f"{name:{width}}  {description}" for name, description in found.items()))
    return int(ExitCode.PASS)


@app.command()
def schema() -> int:
    """Print the recipe's JSON schema."""
    from stillhouse.jobs.recipe import recipe_json_schema

    say(json.dumps(recipe_json_schema(), indent=2))
    return int(ExitCode.PASS)


@app.command()
def plan(recipe: RecipeArgument, overrides: SetOption = None, as_json: JsonOption = False) -> int:
    """Explain what a recipe would do and cost; run nothing."""
    from dataclasses import asdict

    from stillhouse.jobs import plan as planning

    made = planning.plan(_recipe(recipe, overrides))
    say(json.dumps(asdict(made), indent=2) if as_json else planning.render_text(made))
    return int(ExitCode.PASS)


@app.command()
def doctor(as_json: JsonOption = False) -> int:
    """Say what works on this machine."""
    from dataclasses import asdict

    from stillhouse.jobs import doctor as examination

    findings = examination.diagnose()
    say(json.dumps([asdict(finding) for finding in findings], indent=2) if as_json else examination.render_text(findings))
    return int(ExitCode.PASS)


@app.command()
def status(run: Annotated[Path, typer.Argument(help="A run's folder.")], as_json: JsonOption = False) -> int:
    """Say how far a run is and what its traces cost.

    Reads the run's folder alone, so also while it is at work.
    """
    from dataclasses import asdict

    from stillhouse.jobs.status import read_status, status_text

    found = read_status(run)
    say(json.dumps(asdict(found) | {"cost": found.cost.model_dump()}, indent=2) if as_json else status_text(found))
    return int(ExitCode.PASS)


app.command("teachers")(list_teachers)
app.command("verify", epilog="Exit codes: 0 judged, 2 a row or kind that is not understood; with --self-test 1: not sound.")(
    verify
)
PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
app.command("fault-server", context_settings=PASSED_ON)(fault_server)


@app.command(epilog=OUTCOMES + " With --follow these are the job's own.")
def submit(
    recipe: RecipeArgument,
    address: Annotated[str, typer.Option("--address", help="The cluster's dashboard, for example http://127.0.0.1:8265.")],
    out: Annotated[str, typer.Option("--out", help="The run's folder: an absolute path that every node sees.")],
    overrides: SetOption = None,
    follow: Annotated[bool, typer.Option("--follow", help="Stream the job's output and return its exit code.")] = False,
    as_json: JsonOption = False,
) -> int:
    """Send a run to a Ray cluster as a job.

    The package, the resolved recipe and the problem files travel along.
    """
    from stillhouse.jobs.submit import submit as send

    def show(text: str) -> None:
        print(text, end="", file=sys.stderr if as_json else sys.stdout, flush=True)

    job_id, code = send(_recipe(recipe, overrides), address=address, out=out, follow=follow, show=show)
    if as_json:
        say(json.dumps({"job_id": job_id, "exit_code": code if follow else None}))
    elif not follow:
        say(f"{job_id}\nfollow it with: ray job logs --address {address} --follow {job_id}")
    return code


@bench_app.command("kernels")
def bench_kernels(
    only: Annotated[
        str | None, typer.Option("--only", help="Sections: machine,decode,prefill,backward,model,qlora. Default: all.")
    ] = None,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="Default: torch's own number.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes, two rounds: shows that everything runs.")] = False,
    svg: Annotated[Path | None, typer.Option("--svg", help="Write a roofline plot there.", dir_okay=False)] = None,
    batches: Annotated[str | None, typer.Option("--batches", help="Rows of x, such as 1,16,128.")] = None,
    shape: Annotated[str | None, typer.Option("--shape", help="The layer, NxK; default 4096x4096.")] = None,
    num_layers: Annotated[int | None, typer.Option("--layers", min=1, help="Of the QLoRA model; default 12.")] = None,
    as_json: JsonOption = False,
) -> int:
    """4-bit layers, whole models and QLoRA steps against named peers: ratios of medians beside the machine's roofs."""
    # Peers are measured as their users run them, with OpenMP's own way of waiting: the one that settle_environment sets for
    # machines that are shared costs every contender some microseconds a call. Has to happen before torch is imported.
    if os.environ.get("OMP_WAIT_POLICY") == PROCESS_ENVIRONMENT["OMP_WAIT_POLICY"]:
        del os.environ["OMP_WAIT_POLICY"]
    from stillhouse.kernels.bench import main as bench

    try:
        options = bench.read_options(only, batches, shape, svg)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    bench.main(as_json=as_json, threads=threads, quick=quick, num_layers=num_layers, **options)
    return int(ExitCode.PASS)


def main() -> None:
    """Entry point: turns what was raised into one sentence and the exit code that belongs to it."""
    from typer.main import get_command

    settle_environment()
    try:
        code = get_command(app).main(standalone_mode=False)
    except StillhouseError as error:
        print(f"stillhouse: {error}", file=sys.stderr)
        code = error.exit_code
    except USAGE_ERRORS as error:
        error.show()
        code = ExitCode.USAGE
    except (KeyboardInterrupt, typer.Abort):
        print("stillhouse: interrupted; what is committed stays, the same command goes on from there", file=sys.stderr)
        code = ExitCode.INTERRUPTED
    except Exception:  # a defect of ours: shown whole, under a code that no verdict uses
        import traceback

        traceback.print_exc()
        print("stillhouse: this is a defect; please report it with the lines above", file=sys.stderr)
        code = ExitCode.INFRASTRUCTURE
    sys.exit(int(code or 0))


if __name__ == "__main__":
    main()
