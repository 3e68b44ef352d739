"""`moesim fit-engine`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from configs.errors import UserError
from configs.files import prepare_directory

if TYPE_CHECKING:
    from sim.fit_engine import Range
    from sim.fit_input import Case, Curve


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("fit-engine")(fit_engine_command)


def fit_engine_command(
    file: Annotated[
        Path | None,
        typer.Argument(help="YAML file with points and predict, in place of the options."),
    ] = None,
    point: Annotated[
        list[str] | None,
        typer.Option("--point", help="Measured: hit=36.6%,tps=10.5 (or slots=24,tps=10.5)."),
    ] = None,
    predict: Annotated[
        list[str] | None,
        typer.Option("--predict", help="Asked for: hit=74.1% (or slots=73); repeatable."),
    ] = None,
    accesses: Annotated[
        str | None,
        typer.Option("--accesses", help="Experts a token asks for: MoE layers x top-k, 48x8."),
    ] = None,
    geometry: Annotated[
        str | None, typer.Option("--geometry", help="Model that has them, in place of --accesses.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="Precision of its experts: bf16, int4 ...")
    ] = None,
    expert_bytes: Annotated[
        str | None, typer.Option("--expert-bytes", help="Size of one expert: 2.7MiB.")
    ] = None,
    link: Annotated[
        str | None,
        typer.Option("--link", help="Link rate, if known: splits a miss into copy and fixed cost."),
    ] = None,
    resident_tps: Annotated[
        float | None,
        typer.Option("--resident-tps", help="Tokens/s with all experts on the GPU."),
    ] = None,
    noise: Annotated[
        str | None,
        typer.Option("--noise", help="Standard deviation of a measured speed; 3% without it."),
    ] = None,
    trace: Annotated[
        str | None, typer.Option("--trace", help="Simulate hit rates of slots on this trace.")
    ] = None,
    policy: Annotated[
        str | None, typer.Option("--policy", help="The engine's cache; lru without it.")
    ] = None,
    figure: Annotated[
        Path | None, typer.Option("--figure", help="Draw the curve: FILE.png and FILE.svg.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object on stdout, nothing else.")
    ] = False,
) -> None:
    """Fit another engine from a few measured speeds; predict its speed at other hit rates.

    Speeds are decode tokens/s of one request. Two determine the curve, more test it; where the
    engine does not fit, the output says why.

    Example: moesim fit-engine --point hit=36.6%,tps=10.5 --point hit=96.2%,tps=51.9
    --predict hit=74.1% --predict hit=89.4% --accesses 48x8 --resident-tps 311
    """
    from sim.fit_input import make_curve

    given = {
        "points": point,
        "predict": predict,
        "accesses": accesses,
        "geometry": geometry,
        "dtype": dtype,
        "expert_bytes": expert_bytes,
        "link": link,
        "resident_tps": resident_tps,
        "noise": noise,
        "trace": trace,
        "policy": policy,
    }
    case = _case(file, {name: value for name, value in given.items() if value})
    if figure is not None:
        prepare_directory(figure.parent, "--figure")
    curve = make_curve(case)
    result = report(curve)
    if as_json:
        print(json.dumps(result, indent=2, allow_nan=False))
    else:
        print("\n".join(lines(curve)))
    if figure is not None:
        _draw(curve, figure)


def _case(file: Path | None, given: dict[str, Any]) -> Case:
    from configs.load import validated
    from sim.fit_input import Case, Measured, Place, parse_fields, parse_share, read_case

    if file is not None:
        if given:
            option = {"points": "point"}.get(next(iter(given)), next(iter(given)))
            raise UserError(
                f"{file} and --{option.replace('_', '-')}: write it into the file, or give "
                "options alone"
            )
        return read_case(file)
    if "points" not in given:
        raise UserError("no measured speed: give --point hit=36.6%,tps=10.5 twice or more")
    given["points"] = tuple(parse_fields(each, "--point", Measured) for each in given["points"])
    asked = given.get("predict", ())
    given["predict"] = tuple(parse_fields(each, "--predict", Place) for each in asked)
    if "noise" in given:
        given["noise"] = parse_share(given["noise"])
    return validated(Case, given, "fit-engine")


def report(curve: Curve) -> dict[str, Any]:
    """A fit, JSON-ready. Times in ms, rates in bytes/s; ranges are 95 % intervals."""
    from sim.point import produced_by

    fit = curve.fit
    return {
        "form": fit.form,
        "fits": fit.fits,
        "misfits": list(fit.misfits),
        "notes": list(fit.notes),
        "accesses_per_token": fit.demand.accesses,
        "layers": fit.demand.layers,
        "noise": fit.problem.noise,
        "resident_ms": fit.resident_ms,
        "base_ms": _range(fit.base_ms),
        "wait_ms": _range(fit.wait_ms),
        "miss_ms": _range(fit.miss_ms),
        "expert_bytes": curve.expert_bytes,
        "effective_bytes_per_s": _bytes_per_s(curve),
        "copy_ms": _copy_ms(curve),
        "unexplained": fit.unexplained,
        "points": [
            {
                "slots": point.slots,
                "hit_rate": speed.hit_rate,
                "misses_per_token": fit.demand.misses(speed.hit_rate),
                "tokens_per_s": speed.tokens_per_s,
                "fitted_ms": fit.curve_ms(speed.hit_rate),
            }
            for point, speed in curve.points
        ],
        "left_out": [
            {
                "hit_rate": each.speed.hit_rate,
                "tokens_per_s": each.speed.tokens_per_s,
                "predicted_tokens_per_s": _range(_speeds(each.predicted_ms)),
                "error": each.error,
            }
            for each in fit.left_out
        ],
        "predictions": [
            {
                "slots": place.slots,
                "hit_rate": hit,
                "misses_per_token": fit.demand.misses(hit),
                "ms": _range(fit.predict_ms(hit)),
                "tokens_per_s": _range(_speeds(fit.predict_ms(hit))),
            }
            for place, hit in curve.places
        ],
        "produced_by": produced_by(),
    }


def lines(curve: Curve) -> list[str]:
    """A fit for people."""
    fit = curve.fit
    text = [
        f"time a token = {fit.form}, {fit.demand.accesses} experts a token",
        f"  base      {_shown(fit.base_ms)} ms a token without a miss",
    ]
    if fit.wait_ms.value > 0:
        text.append(f"  wait      {_shown(fit.wait_ms)} ms a layer that misses any")
    text.append(f"  miss      {_shown(fit.miss_ms)} ms each{_rate(curve)}")
    text += _copy_line(curve)
    for misfit in fit.misfits:
        text.append(f"  does not fit: {misfit}")
    if fit.fits and len(fit.speeds) > 2 and fit.unexplained <= fit.problem.noise:
        text.append(f"  fits within the noise of {fit.problem.noise:.1%}")
    for note in fit.notes:
        text.append(f"  note: {note}")
    text += ["", f"{'':10}{'hits':>7}{'misses':>9}{'tokens/s':>10}  95 % interval"]
    for point, speed in curve.points:
        text.append(_row("measured", point.slots, speed.hit_rate, speed.tokens_per_s, curve))
    for each in fit.left_out:
        hit, speeds = each.speed.hit_rate, _speeds(each.predicted_ms)
        row = _row("left out", None, hit, speeds.value, curve)
        text.append(f"{row}  {_between(speeds)}, off by {each.error:+.1%}")
    for place, hit in curve.places:
        speeds = _speeds(fit.predict_ms(hit))
        row = _row("predicted", place.slots, hit, speeds.value, curve)
        text.append(f"{row}  {_between(speeds)}")
    return text


def _row(what: str, slots: int | None, hit: float, tokens_per_s: float, curve: Curve) -> str:
    from sim.wording import three_figures

    misses = curve.fit.demand.misses(hit)
    row = f"{what:10}{hit:>7.1%}{misses:>9.1f}{three_figures(tokens_per_s):>10}"
    return row if slots is None else f"{row}  ({slots} slots a layer)"


def _rate(curve: Curve) -> str:
    size, miss = curve.expert_bytes, curve.fit.miss_ms.value
    if size is None or miss <= 0:
        return ""
    return (
        f": {size / miss / 1e6:.1f} GB/s in effect, of {size / 1e6:.2f} MB an expert "
        f"({curve.expert_bytes_from})"
    )


def _copy_line(curve: Curve) -> list[str]:
    copy = _copy_ms(curve)
    if copy is None:
        return []
    fixed = curve.fit.miss_ms.value - copy
    if fixed < 0:
        return [
            f"            a copy over this link takes {copy:.3g} ms: {-fixed:.3g} ms of it are "
            "hidden, or experts are smaller"
        ]
    return [f"            {copy:.3g} ms of it copying over this link, {fixed:.3g} ms fixed"]


def _copy_ms(curve: Curve) -> float | None:
    if curve.expert_bytes is None or curve.link_bytes_per_s is None:
        return None
    return curve.expert_bytes / curve.link_bytes_per_s * 1e3


def _bytes_per_s(curve: Curve) -> dict[str, float | None] | None:
    """Of one expert over the time a miss adds; no most where that time may be nothing."""
    miss = curve.fit.miss_ms
    if curve.expert_bytes is None or miss.value <= 0:
        return None
    return {
        "value": curve.expert_bytes / miss.value * 1e3,
        "low": curve.expert_bytes / miss.high * 1e3,
        "high": curve.expert_bytes / miss.low * 1e3 if miss.low > 0 else None,
    }


def _speeds(ms: Range) -> Range:
    """Tokens/s of times a token."""
    from sim.fit_engine import Range

    return Range(1e3 / ms.value, 1e3 / ms.high, 1e3 / ms.low if ms.low > 0 else float("inf"))


def _range(values: Range) -> dict[str, float | None]:
    """Without an end where it is unbounded: JSON has no infinity."""
    high = values.high if values.high < float("inf") else None
    return {"value": values.value, "low": values.low, "high": high}


def _shown(values: Range) -> str:
    return f"{values.value:.4g} ({values.low:.4g} to {values.high:.4g})"


def _between(speeds: Range) -> str:
    from sim.wording import three_figures

    if speeds.high == float("inf"):
        return f"{three_figures(speeds.low)} and more"
    return f"{three_figures(speeds.low)} to {three_figures(speeds.high)}"


def _draw(curve: Curve, figure: Path) -> None:
    from sim.plots_fit_engine import draw_curve

    stem = figure.stem if figure.suffix in (".png", ".svg") else figure.name
    for path in draw_curve(curve, figure.parent, stem):
        print(f"moesim: drew {path}", file=sys.stderr)
