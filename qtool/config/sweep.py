"""The sections of a sweep: its base recipe, axes, launcher and speed measurement."""

from importlib.util import find_spec
from typing import Any, Literal

from pydantic import Field, model_validator

from qtool.config.section import OutputPath, Section
from qtool.config.sections import Dtype
from qtool.system.distribution import install
from qtool.system.errors import InputError

# parameters of launchers that ask for resources and names and run no command; slurm_ may stand before those of submitit
SAFE_PARAMETERS = {
    "submitit": (
        *("timeout_min", "time", "mem", "mem_gb", "mem_per_cpu", "mem_per_gpu", "cpus_per_task", "cpus_per_gpu"),
        *("gpus_per_node", "gpus_per_task", "gres", "nodes", "ntasks_per_node", "tasks_per_node", "ntasks_per_gpu"),
        *("partition", "account", "qos", "constraint", "exclude", "nodelist", "reservation", "exclusive"),
        *("array_parallelism", "max_num_timeout", "signal_delay_s", "dependency"),
        *("name", "job_name", "comment", "mail_type", "mail_user", "stderr_to_stdout"),
    ),
    "ray": ("num_cpus", "num_gpus", "memory", "accelerator_type", "max_retries", "name"),
}
LOCAL_ADDRESSES = (None, "auto", "local")  # addresses of a Ray cluster that is on this machine


class LauncherConfig(Section):
    """The place where cells run."""

    name: Literal["local", "submitit", "ray"] = Field(
        "local", description="local: processes on this machine; submitit: Slurm jobs; ray: Ray tasks."
    )
    cluster: Literal["slurm", "local", "debug"] | None = Field(
        None, description="Cluster for the jobs of submitit; unset: Slurm if it is available, else this machine."
    )
    address: str | None = Field(None, description="Address of a running Ray cluster; unset: start Ray on this machine.")
    parameters: dict[str, Any] = Field(
        default_factory=dict,
        description="Arguments of submitit's update_parameters (timeout_min, slurm_partition, gpus_per_node, ...), or "
        "options of a Ray task (num_cpus, num_gpus, ...). Arguments that can run commands need "
        "--allow-launcher-commands.",
    )

    @model_validator(mode="after")
    def _keys_act(self) -> "LauncherConfig":
        idle = [
            f"{key} acts only with name: {owner}"
            for key, owner in (("cluster", "submitit"), ("address", "ray"))
            if getattr(self, key) is not None and self.name != owner
        ]
        if self.parameters and self.name == "local":
            idle.append("parameters act only with a cluster (submitit, ray); --jobs gives the number of processes")
        if idle:
            raise ValueError("; ".join(idle))
        return self

    def commands(self) -> list[str]:
        """Return a line for each key that could run a command of the sweep's author, or send work to another machine.

        Texts go into a shell script as comments, so one of several lines could run what follows its first line.
        """
        safe = SAFE_PARAMETERS.get(self.name, ())
        found = []
        for key, value in self.parameters.items():
            if key.removeprefix("slurm_" if self.name == "submitit" else "") not in safe:
                found.append(f"launcher.parameters.{key}: this may run commands; known to be safe: {', '.join(safe)}")
            elif not isinstance(value, str | int | float | None):
                found.append(f"launcher.parameters.{key}: should be one text or number")
            elif not str(value).isprintable():
                found.append(
                    f"launcher.parameters.{key}: holds characters that cannot be printed, such as a line break"
                )
        if self.address not in LOCAL_ADDRESSES:
            found.append(f"launcher.address: {self.address} may be another machine, which then runs the cells")
        return [
            f"{line}; if you wrote this sweep or trust its author, pass --allow-launcher-commands" for line in found
        ]

    def check(self) -> None:
        """Check that the package of the launcher is installed.

        Raises:
            InputError: The package is not installed.
        """
        if self.name != "local" and find_spec(self.name) is None:
            command = install("cluster") if self.name == "submitit" else f"pip install {self.name}"
            raise InputError(
                f"launcher.name: {self.name} needs the package {self.name}, which is not installed; "
                f"{command}, or use local"
            )


class BenchConfig(Section):
    """The options of ``qtool bench``, which measures speed."""

    prompt_tokens: int = Field(256, ge=2, description="Tokens in the prompt.")
    new_tokens: int = Field(32, ge=1, description="Tokens decoded in each repeat.")
    repeats: int = Field(5, ge=1, description="Measurements of each number; the median is shown.")
    dtype: Dtype = Field("bfloat16", description="Precision of computation.")
    backend: Literal["fast", "dense", "torch", "ort", "gemlite"] = Field(
        "fast",
        description="Kernels of the packed model. fast: what is the fastest for each shape on this machine; dense: "
        "hold the dequantized weights; torch, ort, gemlite: those of that library.",
    )


class SweepConfig(Section):
    """A sweep: the keys that vary, and what is done with each cell."""

    recipe: str | dict[str, Any] = Field(
        default_factory=dict, description="Recipe that every cell starts from: a packaged name, a file, or sections."
    )
    set: dict[str, Any] = Field(
        default_factory=dict, description="Changes to the recipe of every cell: dotted key -> value."
    )
    grid: dict[str, list[Any] | dict[str, Any]] = Field(
        default_factory=dict,
        description="Axes; every combination of their values is a cell. A recipe key -> its values, as a list or by "
        "label; any other name -> label -> changes (dotted key -> value).",
    )
    exclude: tuple[dict[str, Any], ...] = Field(
        (),
        description="Cells to leave out: axis -> value or list of values; a cell is left out if all axes of an entry "
        "match.",
    )
    cells: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="Further cells by name: dotted key -> value, columns (axis -> label) for the table, and start, the "
        "name of a cell from whose checkpoint this one's training starts.",
    )
    over: tuple[str, ...] = Field(
        (), description="Axes over which the table gives mean and standard deviation, e.g. seed."
    )
    keep: Literal["all", "reports"] = Field(
        "all",
        description="all: keep checkpoints and reports; reports: delete the weights of a cell after measuring it.",
    )
    missing_models: Literal["error", "skip"] = Field(
        "error",
        description="skip: do not run a cell whose model is not on this machine, and download nothing; error: "
        "download the model, or refuse the sweep.",
    )
    bench: bool | BenchConfig = Field(
        False,
        description="Also measure speed, memory and energy, one cell after another: true, or a mapping with keys of "
        "qtool bench (repeats, ...).",
    )
    launcher: LauncherConfig = Field(LauncherConfig(), description="Launcher that runs the cells.")
    output: OutputPath | None = Field(None, description="Folder of the sweep; unset: out/sweeps/<name of the file>.")

    def bench_options(self) -> BenchConfig | None:
        """The options of ``qtool bench``; the defaults if ``bench`` is only ``true``, ``None`` if it is ``false``."""
        if isinstance(self.bench, BenchConfig):
            return self.bench
        return BenchConfig() if self.bench else None
