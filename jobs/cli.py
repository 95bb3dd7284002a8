"""The `eagleray` command.

Starting it must be quick, also for `--help` and shell completion: torch and Ray are imported by the job that
needs them, never here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

import eagleray
from eagleray.jobs import display
from eagleray.jobs.launch import clean_exit, configure_logging, start
from eagleray.jobs.registry import job_name, load_job
from eagleray.platform.config import ConfigError, json_schema, load_config
from eagleray.platform.history import compare_runs, list_runs, load_run
from eagleray.platform.keys import add_key, read_keys, remove_key

app = typer.Typer(
    help="Experiments with reward models, preference data, attention sharing and speech translation on Ray.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
config_app = typer.Typer(help="Look at configurations without running anything.", no_args_is_help=True)
runs_app = typer.Typer(help="Look at recorded runs.", no_args_is_help=True)
cluster_app = typer.Typer(help="Clusters for trying things.", no_args_is_help=True)
experiment_app = typer.Typer(help="Whole experiments from one file.", no_args_is_help=True)
keys_app = typer.Typer(help="API keys of `eagleray serve`.", no_args_is_help=True)
app.add_typer(config_app, name="config")
app.add_typer(keys_app, name="keys")
app.add_typer(cluster_app, name="cluster")
app.add_typer(experiment_app, name="experiment")
app.add_typer(runs_app, name="runs")

ConfigFile = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="YAML file; its key `job` says what to run.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings over the file's, e.g. optim.lr=2e-5."),
]
KeyFile = Annotated[Path, typer.Argument(help="File of keys; made if it is missing.")]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")]
RunPaths = Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.")]


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the `eagleray` command."""
    configure_logging()
    with clean_exit():
        app(args=argv, prog_name="eagleray")


@app.callback(invoke_without_command=True)
def _global_options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", is_eager=True)
    ] = False,
) -> None:
    if version:
        typer.echo(eagleray.__version__)
        raise typer.Exit()


@app.command("train")
def train(config: ConfigFile, overrides: Overrides = None) -> None:
    """Run the job that a config file describes.

    A run that was stopped goes on with `run.dir=FOLDER` and the same config; the folder's own `config.yaml` is
    that config.
    """
    start(None, config, overrides or [])


@app.command("select")
def select(config: ConfigFile, overrides: Overrides = None) -> None:
    """Select preference data as a config file of the job `select` describes."""
    start("select", config, overrides or [])


@app.command("sweep")
def sweep(
    space: Annotated[
        str | None, typer.Argument(metavar="SPACE", help="What to vary, e.g. label_smoothing or optim.")
    ] = None,
    overrides: Overrides = None,
    config: Annotated[
        Path | None, typer.Option(help="Config file of the training job that every trial runs.")
    ] = None,
    search: Annotated[
        str | None, typer.Option(help="grid, random or optuna; grid, or random with --num-samples.")
    ] = None,
    scheduler: Annotated[
        str,
        typer.Option(help="none, asha to stop bad trials early, or pbt to have them go on from good ones."),
    ] = "none",
    num_samples: Annotated[int | None, typer.Option(help="Points to try with random and optuna.")] = None,
    perturb_every: Annotated[int | None, typer.Option(help="Steps between two exploits of pbt.")] = None,
    max_concurrent: Annotated[
        int | None, typer.Option(help="Trials at a time; default: what the cluster holds.")
    ] = None,
    seeds: Annotated[
        str, typer.Option(help="Seeds to run each point with: how many, or a list, e.g. 0,1,2.")
    ] = "1",
    objective: Annotated[
        list[str] | None, typer.Option(help="metric:max or metric:min; the first selects. May be repeated.")
    ] = None,
    resume: Annotated[str | None, typer.Option(help="Folder, or URI, of a sweep that was cut short.")] = None,
) -> None:
    """Train over a space of config values; ends with a table and the best config as a file for `train`."""
    from eagleray.jobs.sweep import (
        main,
        parse_seeds,
        resumed_config,
        sweep_config,
    )  # Tune takes seconds to import

    with clean_exit():  # inside, because typer ends on Ctrl-C without a word
        if resume is not None:
            if space is not None or config is not None:
                raise ConfigError(
                    "`--resume` goes on with the sweep in its folder; give nothing else with it."
                )
            cfg = resumed_config(resume)
        elif space is None or config is None:
            raise ConfigError("A sweep needs a SPACE and `--config`, or `--resume` with the folder of one.")
        else:
            options = {"search": search, "scheduler": scheduler, "num_samples": num_samples}
            options |= {"perturb_every": perturb_every, "max_concurrent": max_concurrent}
            options |= {"seeds": parse_seeds(seeds), "objectives": objective or []}
            cfg = sweep_config(space, config, overrides or [], **options)
        done = main(cfg)
    typer.echo(f"{done.table}\nTrain the best with: eagleray train {done.best}")


@app.command("serve")
def serve(
    settings: Annotated[
        list[str],
        typer.Argument(
            metavar="KIND[:NAME]=FOLDER [KIND[:NAME].KEY=VALUE]...",
            help="e.g. gram=runs/demo/model gram.max_responses=16 nast=runs/nast/model",
        ),
    ],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.")] = 8000,
    grpc_port: Annotated[
        int | None, typer.Option(help="Port for gRPC, which listens on all addresses and so needs --keys.")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="Running Ray cluster; default: a private local one.")
    ] = None,
    print_yaml: Annotated[
        bool, typer.Option("--print-yaml", help="Print the file for `serve deploy` and stop.")
    ] = False,
    render: Annotated[
        bool, typer.Option("--render", help="Print a KubeRay RayService (settings: kube.KEY=VALUE) and stop.")
    ] = False,
    update: Annotated[
        bool,
        typer.Option("--update", help="Make the server at --address serve these models and no others."),
    ] = False,
    keys: Annotated[
        Path | None,
        typer.Option(help="File of API keys (`eagleray keys add`); needed for a host that others can reach."),
    ] = None,
) -> None:
    """Serve models over HTTP on this machine until Ctrl-C."""
    from eagleray.jobs import serve as jobs  # Ray and torch load only here

    if render:
        typer.echo(jobs.render(settings, keys=keys), nl=False)
        return
    if update:
        jobs.update_models(settings, address=address)
        return
    jobs.serve_models(
        settings, host=host, port=port, grpc_port=grpc_port, address=address, print_yaml=print_yaml, keys=keys
    )


@keys_app.command("add")
def keys_add(
    name: Annotated[str, typer.Argument(help="Whose key it is; appears in logs.")],
    file: KeyFile,
    per_minute: Annotated[
        int | None, typer.Option(min=1, help="Most requests a minute; default: no limit.")
    ] = None,
) -> None:
    """Make an API key and print it, this once; the file keeps its hash."""
    typer.echo(add_key(file, name, per_minute=per_minute))


@keys_app.command("list")
def keys_list(file: KeyFile) -> None:
    """Print whose keys there are, their rates and when they were made."""
    for key in read_keys(file):
        rate = "no limit" if key.per_minute is None else f"{key.per_minute} a minute"
        typer.echo(f"{key.name}  {rate}  {key.created}")


@keys_app.command("remove")
def keys_remove(
    name: Annotated[str, typer.Argument(help="Whose key it is.")],
    file: KeyFile,
) -> None:
    """Remove an API key; running servers refuse it within a second."""
    remove_key(file, name)


@app.command("score")
def score(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model folder or hub name.")],
    files: Annotated[
        list[str],
        typer.Argument(metavar="FILE... [KEY=VALUE]...", help="Pairs; settings as of `gram.score`."),
    ],
) -> None:
    """Score answer pairs in files of any size; a run that was stopped goes on with the same `run.dir`."""
    sources = [{"path": name} for name in files if "=" not in name]
    kind = "discriminative" if Path(model, "reward_model.json").exists() else "judge"
    given = [f"scorer.kind={kind}", f"scorer.path={model}", f"pairs.sources={json.dumps(sources)}"]
    start("gram.score", None, [*given, *(setting for setting in files if "=" in setting)])


@app.command("submit")
def submit(
    config: ConfigFile,
    overrides: Overrides = None,
    address: Annotated[
        str | None,
        typer.Option(
            envvar="RAY_API_SERVER_ADDRESS", help="Dashboard of the cluster, e.g. http://head:8265."
        ),
    ] = None,
    wait: Annotated[bool, typer.Option(help="Follow the log, and end with the job's exit code.")] = True,
    render: Annotated[
        bool, typer.Option("--render", help="Print a KubeRay RayJob (settings: kube.KEY=VALUE) and stop.")
    ] = False,
) -> None:
    """Run the job that a config file describes on a Ray cluster; only this code and the config are sent there."""
    from eagleray.jobs import submit as jobs  # the job's module may take seconds to import

    with clean_exit():
        if render:
            typer.echo(jobs.render(config, overrides or []), nl=False)
            return
        if address is None:
            raise ConfigError(
                "Give the dashboard of the cluster as `--address`, e.g. http://head:8265, or `--render`."
            )
        raise SystemExit(jobs.submit(config, overrides or [], address=address, wait=wait))


@app.command("plan")
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes of the cluster.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs of each node; one worker on each.")] = 1,
    gpu: Annotated[str, typer.Option(help="l4, l40s, a100-40, a100, h100 or h200.")] = "h100",
    utilisation: Annotated[
        float, typer.Option(min=0.01, max=1, help="Share of the GPU's peak FLOP/s that training reaches.")
    ] = 0.4,
) -> None:
    """Estimate memory, time and volumes of a training run on GPUs, and propose the cheapest setting that fits."""
    from eagleray.jobs.plan import make_plan, print_plan  # the job's module may take seconds to import

    options = {"nodes": nodes, "gpus_per_node": gpus_per_node, "gpu": gpu, "utilisation": utilisation}
    print_plan(*make_plan(config, overrides or [], **options), Console())


@experiment_app.command("run")
def experiment_run(
    config: ConfigFile,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the stages, what they take and an estimate, and stop.")
    ] = False,
    address: Annotated[
        str | None, typer.Option(help="Running Ray cluster; default: a private local one for each stage.")
    ] = None,
) -> None:
    """Run the stages of an experiment that are not done, side by side where they can, and write one report."""
    from eagleray.jobs import experiment as jobs

    with clean_exit():
        given = [f"ray.address={address}"] if address is not None else []
        cfg = load_config(jobs.Config, config, [*(overrides or []), *given])
        if dry_run:
            jobs.dry_run(cfg, display.console())
        else:
            jobs.main(cfg)


@cluster_app.command("local")
def cluster_local(
    nodes: Annotated[int, typer.Option(min=1, help="Ray nodes to start on this machine.")] = 2,
    cpus_per_node: Annotated[
        int, typer.Option(min=1, help="CPU cores each node offers; more than there are is allowed.")
    ] = 1,
) -> None:
    """Run a Ray cluster of several nodes on this machine until Ctrl-C; other clusters are left alone."""
    from eagleray.jobs.local_cluster import run_local_cluster

    with clean_exit():
        run_local_cluster(nodes, cpus_per_node)


@config_app.command("show")
def config_show(config: ConfigFile, overrides: Overrides = None) -> None:
    """Print every key of the resolved config with its value, where the value comes from and what it means."""
    overrides = overrides or []
    cfg = load_config(load_job(job_name(config)).Config, config, overrides)
    display.print_config(display.config_rows(cfg, overridden=[text.partition("=")[0] for text in overrides]))


@config_app.command("schema")
def config_schema(job: Annotated[str, typer.Argument(help="Name of the job, e.g. gram.finetune.")]) -> None:
    """Print the JSON schema of a job's config, by which editors complete and check the YAML."""
    typer.echo(json.dumps(json_schema(load_job(job).Config), indent=2, ensure_ascii=False))


@runs_app.command("list")
def runs_list(
    root: Annotated[Path, typer.Argument(help="Folder to look in, at any depth.")] = Path("runs"),
) -> None:
    """List all runs, oldest first."""
    display.print_run_list(list_runs(root), root)


@runs_app.command("show")
def runs_show(run: RunPath) -> None:
    """Print how a run was made, how it ended and what came out."""
    display.print_run(load_run(run))


@runs_app.command("compare")
def runs_compare(runs: RunPaths) -> None:
    """Print the config keys in which runs differ, and their final metrics side by side."""
    display.print_comparison(compare_runs(runs))


@runs_app.command("plot")
def runs_plot(
    runs: RunPaths,
    out: Annotated[Path, typer.Option(help="Picture to write when several runs are compared.")] = Path(
        "comparison.png"
    ),
) -> None:
    """Draw the curves of one run into its `plots/`, or lay several runs over each other."""
    from eagleray.platform.plots import plot_comparison, plot_training  # matplotlib takes a second to import

    for path in plot_training(runs[0]) if len(runs) == 1 else [plot_comparison(runs, out)]:
        typer.echo(path)


@runs_app.command("html")
def runs_html(
    root: Annotated[Path, typer.Argument(help="Folder to look in, at any depth.")] = Path("runs"),
    out: Annotated[Path, typer.Option(help="Page to write.")] = Path("runs.html"),
) -> None:
    """Write a page with all runs, their results and curves: one file, to be opened in a browser or passed on."""
    from eagleray.platform.runs_page import write_page

    write_page(list_runs(root), root, out)
    typer.echo(out)


if __name__ == "__main__":
    main()
