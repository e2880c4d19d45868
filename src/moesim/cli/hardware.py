"""`moesim hardware`: what machines are known, and what an expert costs on one."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moesim.cli.common import Commands, check_output, print_json, setting_pairs

if TYPE_CHECKING:
    from moesim.model import ModelSpec
    from moesim.profile import HardwareProfile

CROSSOVER_TOKENS = 65536
"""How far the crossover is looked for."""


@click.group(cls=Commands, invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def command(context: click.Context, as_json: bool) -> None:
    """List the machines that moesim knows, or show one."""
    if context.invoked_subcommand is not None:
        return
    from moesim.profile import load_profile, profile_names

    profiles = [load_profile(name)[0] for name in profile_names()]
    if as_json:
        print_json([_summary(profile) for profile in profiles])
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("hardware", no_wrap=True)
    table.add_column("GPU", no_wrap=True)
    for title in ("GiB", "GPU\nGB/s", "TFLOPS", "link\nGB/s", "experts\non CPU\nGB/s"):
        table.add_column(title, justify="right", no_wrap=True)
    for own in profiles:
        table.add_row(
            own.name,
            own.gpu.name.removeprefix("NVIDIA ").removeprefix("GeForce "),
            f"{own.gpu.memory_bytes / 2**30:.0f}",
            f"{own.gpu.memory_bytes_per_s / 1e9:.0f}",
            f"{own.gpu.flops_per_s / 1e12:.0f}",
            f"{own.link.h2d.bytes_per_s / 1e9:.1f}",
            f"{own.cpu.expert_bytes_per_s / 1e9:.0f}",
        )
    Console().print(table)


@command.command()
@click.argument("name", required=False)
@click.option("--model", default="qwen3-30b-a3b", show_default=True, help="Model for the times.")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change one number of the profile.",
)
@click.option(
    "--plot",
    type=click.Path(path_type=Path),
    metavar="FILE.png",
    help="Draw the times of an expert and of copies, too.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show(
    name: str | None, model: str, settings: tuple[str, ...], plot: Path | None, as_json: bool
) -> None:
    """Show one machine: a name of the list, a YAML file, or by default this one."""
    from moesim.model import load_model
    from moesim.profile import load_profile, with_overrides

    profile, notice = load_profile(name)
    profile = with_overrides(profile, setting_pairs(settings))
    spec, tables = load_model(model), profile.tables
    if plot is not None:
        from moesim.calibrate.plots import draw_profile

        check_output(plot)
        draw_profile(profile, spec, plot)
        click.echo(f"{plot}: one expert of {spec.name}, and copies", err=True)
    if notice:
        click.echo(notice, err=True)
    measured = {(t.hidden, t.width) for t in (*tables.expert_gpu, *tables.expert_cpu)}
    if measured and (spec.hidden, spec.expert_width) not in measured:
        click.echo(
            f"no expert of {spec.name} was measured, its times are those of a roofline; experts of "
            + ", ".join(f"{hidden}x{width}" for hidden, width in sorted(measured))
            + " were: --model takes one that has them",
            err=True,
        )
    times = _times(spec, profile)
    if as_json:
        import msgspec

        print_json(
            {**_summary(profile), "times": times, "profile": msgspec.to_builtins(profile)},
        )
        return
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(box=None, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    for title, text in _sections(profile).items():
        table.add_row(title, text)
    console.print(profile.name, profile.description, sep=": ", markup=False, highlight=False)
    console.print(table)

    table = Table(box=None, header_style="bold", title=f"One expert of {spec.name}")
    for title in (
        "bits",
        "MB",
        "copy ms",
        "GPU µs\n1 token",
        "CPU ms\n1 token",
        "CPU slower than copy\nfrom n* tokens",
    ):
        table.add_column(title, justify="right")
    for row in times["experts"]:
        crossover = row["crossover_tokens"]
        table.add_row(
            str(row["bits"]),
            f"{row['bytes'] / 1e6:.2f}",
            f"{row['copy_ns'] / 1e6:.3f}",
            f"{row['gpu_ns'] / 1e3:.1f}",
            f"{row['cpu_ns'] / 1e6:.3f}",
            str(crossover) if crossover else f"> {CROSSOVER_TOKENS}",
        )
    console.print(table)

    table = Table(box=None, header_style="bold", title="Where the numbers come from")
    table.add_column("section", no_wrap=True)
    table.add_column("source", no_wrap=True)
    table.add_column("note")
    for section in profile.provenance.__struct_fields__:
        origin = getattr(profile.provenance, section)
        table.add_row(section, origin.source, origin.note)
    console.print(table)


@command.command()
@click.argument("first")
@click.argument("second")
@click.option("--model", default="qwen3-30b-a3b", show_default=True, help="Model for the times.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def compare(first: str, second: str, model: str, as_json: bool) -> None:
    """Compare two machines, number by number; the ratio is the second by the first."""
    from moesim.model import load_model
    from moesim.profile import load_profile

    one, other = load_profile(first)[0], load_profile(second)[0]
    spec = load_model(model)
    rows = _pairs(_numbers(one), _numbers(other)) + _pairs(
        _expert_numbers(spec, one), _expert_numbers(spec, other)
    )
    if as_json:
        print_json(
            {
                "first": _summary(one),
                "second": _summary(other),
                "model": spec.name,
                "numbers": rows,
            }
        )
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("")
    for title in (one.name, other.name, "ratio"):
        table.add_column(title, justify="right")
    section = ""
    for row in rows:
        if (part := row["key"].partition(".")[0]) != section:
            section = part
            sources = [
                getattr(getattr(p.provenance, part, None), "source", "") for p in (one, other)
            ]
            title = f"one expert of {spec.name}" if part == "expert" else part
            table.add_row(f"[bold]{title}[/bold]", *(f"[dim]{text}[/dim]" for text in sources), "")
        name, unit, scale = _readable(row["key"].partition(".")[2])
        shown = ["-" if row[k] is None else f"{row[k] / scale:.4g}" for k in ("first", "second")]
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.3f}"
        table.add_row(f"  {name}{', ' if unit else ''}{unit}", *shown, ratio)
    Console().print(table)


def _numbers(profile: "HardwareProfile") -> dict[str, float]:
    """Return the numbers of a profile's sections by dotted path; tables and provenance aside."""
    import msgspec

    found: dict[str, float] = {}

    def walk(value: Any, path: str) -> None:
        if isinstance(value, dict):
            for key, below in value.items():
                walk(below, f"{path}.{key}" if path else key)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[path] = value

    plain = msgspec.to_builtins(profile)
    for section in ("gpu", "cpu", "link", "disk", "host"):
        walk(plain[section], section)
    for entry in profile.interference:
        for lane, factor in entry.slow.items():
            found[f"interference.{'+'.join(sorted(entry.busy))}: {lane} x"] = factor
    return found


def _expert_numbers(spec: "ModelSpec", profile: "HardwareProfile") -> dict[str, float]:
    from moesim.costs import build_costs, copy_ns
    from moesim.types import H2D

    costs = build_costs(spec, profile, 256, 1)
    found = {"expert.copy_ns": float(copy_ns(costs, H2D, int(costs.expert_bytes[0, 0])))}
    for name, ns in (("gpu", costs.expert_gpu_ns), ("cpu", costs.expert_cpu_ns)):
        for tokens in (1, 16, 256):
            found[f"expert.{name}_{tokens}_tokens_ns"] = float(ns[0, tokens])
    return found


def _pairs(first: dict[str, float], second: dict[str, float]) -> list[dict[str, Any]]:
    """Return both numbers of every key that either has, sections kept together."""
    keys = list(first)
    for key in second:
        if key not in first:
            same = [i for i, k in enumerate(keys) if k.partition(".")[0] == key.partition(".")[0]]
            keys.insert(same[-1] + 1 if same else len(keys), key)
    return [
        {
            "key": key,
            "first": (a := first.get(key)),
            "second": (b := second.get(key)),
            "ratio": b / a if a and b is not None else None,
        }
        for key in keys
    ]


def _readable(key: str) -> tuple[str, str, float]:
    """Return a number's name without its unit, a unit for people, and what to divide by."""
    if "_ns_by_policy." in key:
        return key.replace("_ns_by_policy.", " "), "µs", 1e3
    for suffix, unit, scale in (
        ("bytes_per_s", "GB/s", 1e9),
        ("flops_per_s", "TFLOPS", 1e12),
        ("chunk_bytes", "MiB", 2.0**20),
        ("_bytes", "GiB", 2.0**30),
        ("_ns", "µs", 1e3),
    ):
        if key.endswith(suffix):
            kept = "chunk" if suffix == "chunk_bytes" else ""
            name = key.removesuffix(suffix).rstrip("_.") + kept
            return name.replace("_", " ").replace(".", " ") or "rate", unit, scale
    return key.replace("_", " ").replace(".", " "), "", 1.0


def _sections(profile: "HardwareProfile") -> dict[str, str]:
    gpu, cpu, link, disk, host = (
        profile.gpu,
        profile.cpu,
        profile.link,
        profile.disk,
        profile.host,
    )
    tables = profile.tables
    return {
        "gpu": f"{gpu.name}: {gpu.memory_bytes / 2**30:.0f} GiB at"
        f" {gpu.memory_bytes_per_s / 1e9:.0f} GB/s, {gpu.flops_per_s / 1e12:.0f} TFLOPS,"
        f" {gpu.launch_ns / 1e3:g} µs per kernel",
        "cpu": f"{cpu.name}: {cpu.threads} threads, {cpu.memory_bytes / 2**30:.0f} GiB at"
        f" {cpu.memory_bytes_per_s / 1e9:.0f} GB/s, experts {cpu.expert_bytes_per_s / 1e9:.0f} GB/s"
        f" and {cpu.flops_per_s / 1e12:g} TFLOPS, {cpu.overhead_ns / 1e3:g} µs each",
        "link": f"in {link.h2d.bytes_per_s / 1e9:g} GB/s + {link.h2d.latency_ns / 1e3:g} µs,"
        f" out {link.d2h.bytes_per_s / 1e9:g} GB/s + {link.d2h.latency_ns / 1e3:g} µs,"
        f" chunks of {link.chunk_bytes / 2**20:g} MiB",
        "disk": f"{disk.bytes_per_s / 1e9:g} GB/s + {disk.latency_ns / 1e3:g} µs",
        "host": f"{host.per_layer_ns / 1e3:g} µs per layer,"
        f" {host.per_launch_ns / 1e3:g} per launch, {host.per_sync_ns / 1e3:g} per"
        f" synchronisation, {host.decision_ns / 1e3:g} per decision"
        + "".join(f", {key} {ns / 1e3:g}" for key, ns in host.decision_ns_by_policy.items()),
        "interference": "; ".join(
            f"{' + '.join(entry.busy)}: "
            + ", ".join(f"{lane} x {factor:.3f}" for lane, factor in entry.slow.items())
            for entry in profile.interference
        )
        or "none",
        "tables": f"{len(tables.expert_gpu)} of GPU experts,"
        f" {len(tables.expert_cpu)} of CPU experts, {len(tables.attention)} of attention,"
        f" {len(tables.layer)} of other parts of a layer",
    }


def _summary(profile: "HardwareProfile") -> dict[str, Any]:
    from moesim.profile import profile_digest

    return {
        "name": profile.name,
        "description": profile.description,
        "gpu": profile.gpu.name,
        "gpu_memory_bytes": profile.gpu.memory_bytes,
        "gpu_memory_bytes_per_s": profile.gpu.memory_bytes_per_s,
        "gpu_flops_per_s": profile.gpu.flops_per_s,
        "h2d_bytes_per_s": profile.link.h2d.bytes_per_s,
        "cpu_expert_bytes_per_s": profile.cpu.expert_bytes_per_s,
        "provenance": {
            section: getattr(profile.provenance, section).source
            for section in profile.provenance.__struct_fields__
        },
        "digest": profile_digest(profile),
    }


def _times(spec: "ModelSpec", profile: "HardwareProfile") -> dict[str, Any]:
    """Return what one expert costs at each precision, and from how many tokens a copy is faster.

    `crossover_tokens` is the least n whose CPU time exceeds both the copy and the GPU's time, which
    overlap when experts follow each other; 0 if there is none.
    """
    import numpy as np

    from moesim.costs import build_costs, copy_ns
    from moesim.types import BITS, H2D

    costs = build_costs(spec, profile, CROSSOVER_TOKENS, 1)
    rows = []
    for precision, bits in enumerate(BITS):
        size_bytes = int(costs.expert_bytes[0, precision])
        copy = int(copy_ns(costs, H2D, size_bytes))
        gpu_ns, cpu_ns = costs.expert_gpu_ns[precision], costs.expert_cpu_ns[precision]
        slower = np.flatnonzero(cpu_ns > np.maximum(gpu_ns, copy))
        rows.append(
            {
                "bits": bits,
                "bytes": size_bytes,
                "copy_ns": copy,
                "gpu_ns": int(gpu_ns[1]),
                "cpu_ns": int(cpu_ns[1]),
                "crossover_tokens": int(slower[0]) if len(slower) else 0,
            }
        )
    return {"model": spec.name, "experts": rows}
