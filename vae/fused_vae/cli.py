"""``fused-vae``: the command line. A user's mistake ends in one line on stderr, exit status 2."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, NoReturn

from .errors import TrainingError, UserError

if TYPE_CHECKING:
    from .machine import Machine

INTERRUPTED = 130


class _Parser(argparse.ArgumentParser):
    """argparse prints its usage before an error; this says the error alone."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} ({self.prog} --help lists the options)")


def build_parser() -> argparse.ArgumentParser:
    """Options that were not given are absent from the result, so that --resume can tell them from
    defaults.
    """
    parser = _Parser(
        prog="fused-vae", description="Variational autoencoders on fused ELBO kernels."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser(
        "train",
        help="train a VAE on images",
        description="Train a VAE on images; write a checkpoint, metrics and pictures to a folder.",
        argument_default=argparse.SUPPRESS,
    )
    _add_train_options(train)
    train.add_argument("--resume", action="store_true", help="continue an unfinished run exactly")
    train.add_argument("--beta", type=float, help="weight of the KL (default: 1, the ELBO)")
    _add_objective_options(train)
    sweep = commands.add_parser(
        "sweep",
        help="train at several beta and draw the rate-distortion curve",
        description="Train one VAE per --beta; write RUN/sweep.html. Runs that exist are kept.",
        argument_default=argparse.SUPPRESS,
    )
    _add_train_options(sweep)
    sweep.add_argument(
        "--beta", type=float, nargs="+", dest="betas", help="default: 0.1 1 10 100 1000"
    )
    report = commands.add_parser(
        "report",
        help="explain a trained VAE on one page",
        description="Write RUN/report.html: what the VAE learned, and why it works.",
    )
    report.add_argument("run", help="the folder of a complete run")
    return parser


def _add_train_options(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument
    option(
        "data",
        nargs="?",
        help=(
            "mnist (5000 digits, the default), faces, digits, a folder of images, or a .npy or .npz"
            " file"
        ),
    )
    option("--data", help="the same, as an option")
    option(
        "--run",
        "--folder",  # torchrun stumbles over --run, for it has options that begin so
        help="the run folder (default: runs/ and the name of the data); behind torchrun: --folder",
    )
    option(
        "--overwrite",
        action="store_true",
        help="replace a run that has this name, once the new one is complete",
    )
    option("--network", help="conv (default), mlp, or hierarchy: several stochastic layers")
    option("--latent", type=int, help="latent dimensions, of all layers together (default: 10)")
    option("--layers", type=int, help="of --network hierarchy, sharing --latent (default: 3)")
    option("--flow", help="behind the encoder: none (default), planar or iaf")
    option("--prior", help="standard (default), mixture, vamp or real-nvp")
    option(
        "--variance",
        help="of the decoder: learned (one sigma, default), unit, fixed or predicted (per pixel)",
    )
    option(
        "--sigma",
        type=float,
        help="the decoder's sigma when fixed, its start when learned (default: 0.25)",
    )
    option("--epochs", type=int, help="default: about 900 steps, at most 60 epochs")
    option("--batch-size", type=int, help="default: 100, fewer for less than 300 images")
    option("--lr", type=float, help="highest learning rate of Adam (default: 0.002)")
    option("--held-out", type=float, help="share of the images kept from training (default: 0.1)")
    option("--seed", type=int, help="the same seed gives the same run, bit for bit (default: 0)")
    option("--precision", help="float32 (default) or bfloat16 (autocast)")
    option(
        "--compile",
        action="store_true",
        help="run the model through torch.compile: faster steps after a slow first one",
    )
    option("--device", help="cpu or cuda (default: cuda if there is one)")
    option("--threads", type=int, help="CPU threads (default: torch's choice)")
    option("--quiet", action="store_true", help="no progress bar")
    option(
        "--tensorboard",
        action="store_true",
        help="say so if TensorBoard is not installed; if it is, event files are written anyway",
    )


def _add_objective_options(parser: argparse.ArgumentParser) -> None:
    from .objective_options import OBJECTIVES, options
    from .recipe import flag

    group = parser.add_argument_group(
        "objective",
        "What is trained. Held-out figures are those of the untouched ELBO for all of them.",
    )
    group.add_argument("--objective", help=f"{', '.join(OBJECTIVES)} (default: elbo)")
    group.add_argument(
        "--warm-up", help="of beta: none (default), linear, cosine, or cyclical from 0 to --beta"
    )
    group.add_argument(
        "--warm-up-steps",
        type=int,
        help="length of the warm-up, or of a cycle (default: a fifth, or a quarter, of all steps)",
    )
    for name, option in options().items():
        values = dict.fromkeys(option.defaults.values())  # in order, each once
        default = ", ".join("none" if value != value else f"{value}" for value in values)
        text = f"of {option.owners}: {option.help} (default: {default})"
        group.add_argument(flag(name), type=option.type, help=text)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        arguments = vars(build_parser().parse_args(argv))
        return COMMANDS[arguments.pop("command")](arguments)
    except (UserError, OSError) as error:
        return _end(str(error), 2)
    except TrainingError as error:
        return _end(str(error), 1)
    except KeyboardInterrupt:
        return _end("stopped; --resume continues after the last epoch", INTERRUPTED)
    finally:
        signal.signal(signal.SIGTERM, previous)


def _end(reason: str, status: int) -> int:
    """Say why, in one line; of several ranks the first to fail says it."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        from . import distributed

        if not distributed.first_to_fail():
            return status
        if rank := distributed.this_rank():
            reason = f"rank {rank}: {reason}"
    print(f"fused-vae: {reason}", file=sys.stderr)
    return status


def _interrupt(_signal: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _train(arguments: dict[str, Any]) -> int:
    from . import job
    from .config import TrainConfig

    options = _model_options(arguments)
    overwrite, resume = arguments.get("overwrite", False), arguments.get("resume", False)
    if overwrite and resume:
        raise UserError("--overwrite and --resume exclude each other")
    run = arguments.get("run") or job.default_run(options.get("data", TrainConfig.data))
    if resume:
        job.resume(run, options, _machine(arguments))
    else:
        job.start(run, TrainConfig(**options), _machine(arguments), overwrite=overwrite)
    return 0


def _sweep(arguments: dict[str, Any]) -> int:
    from . import job, machine, sweep
    from .config import TrainConfig

    _alone("sweep")
    machine.check_packages()
    config = TrainConfig(**_model_options(arguments))
    run = arguments.get("run") or job.default_run(config.data + "-sweep")
    betas = arguments.get("betas") or [0.1, 1.0, 10.0, 100.0, 1000.0]
    overwrite = arguments.get("overwrite", False)
    print(sweep.run(run, config, betas, _machine(arguments), overwrite=overwrite))
    return 0


def _alone(command: str) -> None:
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError(f"torchrun starts fused-vae train only, not {command}")


def _model_options(arguments: dict[str, Any]) -> dict[str, Any]:
    from .config import TrainConfig
    from .objective_options import options

    names = {field.name for field in fields(TrainConfig)}
    chosen = {k: v for k, v in arguments.items() if k in names}
    own = {k: v for k, v in arguments.items() if k in options()}
    return {**chosen, "objective_options": own} if own else chosen


def _machine(arguments: dict[str, Any]) -> Machine:
    from .machine import Machine

    device, threads = arguments.get("device"), arguments.get("threads")
    return Machine(
        device,
        threads,
        progress=not arguments.get("quiet", False),
        tensorboard=arguments.get("tensorboard", False),
    )


def _report(arguments: dict[str, Any]) -> int:
    from . import machine, report

    _alone("report")
    machine.check_packages()
    print(report.write(arguments["run"]))
    return 0


COMMANDS: dict[str, Callable[[dict[str, Any]], int]] = {
    "train": _train,
    "sweep": _sweep,
    "report": _report,
}


if __name__ == "__main__":
    sys.exit(main())
