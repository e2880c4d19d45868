"""`moesim models`: what models are known, and what their experts weigh."""

from typing import TYPE_CHECKING, Any

import click

from moesim.cli.common import Commands, print_json

if TYPE_CHECKING:
    from moesim.model import ModelSpec


@click.group(cls=Commands, invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def command(context: click.Context, as_json: bool) -> None:
    """List the models that moesim knows, or show one."""
    if context.invoked_subcommand is not None:
        return
    from moesim.model import load_model, model_names

    rows = [_facts(load_model(name)) for name in model_names()]
    if as_json:
        print_json(rows)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("model", no_wrap=True)
    for title in (
        "MoE\nlayers",
        "experts",
        "top-k",
        "expert\nMB at\n16 bit",
        "expert\nMB at\n4 bit",
        "all\nGB at\n16 bit",
        "all\nGB at\n4 bit",
        "params\n10⁹",
        "active\n10⁹",
    ):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["name"],
            str(row["layers"]),
            str(row["experts"]),
            str(row["top_k"]),
            f"{row['expert_bytes']['16'] / 1e6:.1f}",
            f"{row['expert_bytes']['4'] / 1e6:.2f}",
            f"{row['all_expert_bytes']['16'] / 1e9:.1f}",
            f"{row['all_expert_bytes']['4'] / 1e9:.1f}",
            f"{row['total_params'] / 1e9:.1f}",
            f"{row['active_params'] / 1e9:.1f}",
        )
    Console().print(table)


@command.command()
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show(name: str, as_json: bool) -> None:
    """Show one model: a name of the list, a config.json, or a folder that has one."""
    from moesim.model import load_model, spec_to_dict

    spec = load_model(name)
    facts = _facts(spec)
    if as_json:
        print_json({**facts, "spec": spec_to_dict(spec)})
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    own = spec.attention
    rows = {
        "model": f"{spec.name} ({spec.model_type})",
        "layers": f"{spec.layers} with experts of {spec.hidden_layers}",
        "experts": f"{spec.experts} per layer, top-{spec.top_k} per token",
        "shapes": f"hidden {spec.hidden}, expert {spec.expert_width}, shared {spec.shared_width},"
        f" dense {spec.dense_width}, vocabulary {spec.vocab}",
        "attention": ", ".join(f"{key} {getattr(own, key)}" for key in own.__struct_fields__),
        "parameters": f"{facts['total_params'] / 1e9:.2f} x 10⁹,"
        f" {facts['active_params'] / 1e9:.2f} x 10⁹ active per token",
        "one expert": _sizes(facts["expert_bytes"], 1e6, "MB"),
        "all experts": _sizes(facts["all_expert_bytes"], 1e9, "GB"),
        "outside experts": f"{facts['outside_bytes'] / 1e9:.2f} GB at 16 bit",
        "KV cache": f"{facts['kv_bytes_per_token'] / 1e3:.1f} kB per token",
    }
    for title, text in rows.items():
        table.add_row(title, text)
    Console().print(table)


def _sizes(sizes: dict[str, int], unit: float, name: str) -> str:
    return ", ".join(f"{size / unit:.2f} {name} at {bits} bit" for bits, size in sizes.items())


def _facts(spec: "ModelSpec") -> dict[str, Any]:
    """Return what is worth knowing about a model, in bytes and counts."""
    from moesim import model
    from moesim.types import BITS

    each = {str(bits): model.expert_bytes(spec, bits) for bits in BITS}
    routed = spec.layers * spec.experts
    return {
        "name": spec.name,
        "model_type": spec.model_type,
        "layers": spec.layers,
        "hidden_layers": spec.hidden_layers,
        "experts": spec.experts,
        "top_k": spec.top_k,
        "expert_bytes": each,
        "all_expert_bytes": {bits: routed * size for bits, size in each.items()},
        "outside_bytes": 2 * (model.total_params(spec) - routed * model.expert_params(spec)),
        "kv_bytes_per_token": sum(model.kv_bytes_per_token(spec)),
        "total_params": model.total_params(spec),
        "active_params": model.active_params(spec),
        "digest": model.model_digest(spec),
    }
