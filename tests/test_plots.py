from __future__ import annotations

import itertools

import pytest
import sample_report as sample
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from hardener import plots
from hardener.plots import DARK, LIGHT, MOST, best_curve, draw, half_decade, labels, moments, trained
from hardener.report import Report


def luminance(color: str) -> float:
    """Relative luminance as WCAG 2 defines it."""
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    bright, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def changed(report: Report, **known: object) -> Report:
    return report.model_copy(update={"evidence": report.evidence.model_copy(update=known)})


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        (sample.language_model(), ("curves", "heatmap", "families", "answers")),
        (sample.classifier(), ("curves", "families")),
        (sample.probe_only(), ("curves", "answers")),
        (sample.searched(), ("curves", "heatmap", "families", "answers", "search")),
        (sample.unprobed(), ()),
    ],
    ids=["language model", "classifier", "probe only", "searched", "unprobed"],
)
def test_only_what_the_report_has_is_drawn_for_light_and_for_dark_pages(report, expected, tmp_path):
    names = tuple(f"{name}{theme}.png" for theme in ("", "-dark") for name in expected)
    assert draw(report, tmp_path) == names
    assert {path.name for path in tmp_path.iterdir()} == set(names)


def test_equal_reports_have_equal_bytes_without_date_or_version(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        names = draw(sample.language_model(), tmp_path / folder)
    for name in names:
        first, second = ((tmp_path / folder / name).read_bytes() for folder in ("one", "two"))
        assert first == second
        with Image.open(tmp_path / "one" / name) as picture:
            assert set(picture.info) == {"dpi"}


def test_the_panel_is_solid_so_that_the_page_does_not_shine_through(tmp_path):
    for name in draw(sample.searched(), tmp_path):
        with Image.open(tmp_path / name) as stored:
            picture = stored.convert("RGBA")
        panel = (DARK if "dark" in name else LIGHT).panel
        assert picture.getchannel("A").getextrema() == (255, 255)
        assert picture.getpixel((2, 2)) == (*(int(panel[i : i + 2], 16) for i in (1, 3, 5)), 255)


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_lines_and_text_stand_out_from_the_panel(theme):
    assert contrast(theme.ink, theme.panel) >= 7
    assert all(contrast(color, theme.panel) >= 4 for color in theme.subjects.values())
    assert all(contrast(theme.shares[kind], theme.panel) >= 3 for kind in ("usable", "refused", "collapsed"))


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
@pytest.mark.parametrize("kind", ["protan", "deutan"])
def test_who_cannot_tell_red_from_green_can_tell_the_subjects_and_the_answers(theme, kind):
    for colors in (theme.subjects, theme.shares):
        seen = [confused(color, kind) for color in colors.values()]
        assert min(distance(one, other) for one, other in itertools.combinations(seen, 2)) > 0.14


def confused(color: str, kind: str) -> list[float]:
    """Linear RGB as a dichromat sees it (Viénot, Brettel and Mollon, 1999), by its red and blue shares."""
    red, green, blue = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (red, green, blue))
    share = {"protan": (0.112, 0.888), "deutan": (0.293, 0.707)}[kind]
    yellow = share[0] * red + share[1] * green
    back = {"protan": (0.004, -0.004), "deutan": (-0.022, 0.022)}[kind]
    return [yellow, back[0] * red + back[1] * green + blue]


def distance(one: list[float], other: list[float]) -> float:
    """How far apart two colours look, by the roots of their light, which is about how bright they seem."""
    return sum((max(a, 0) ** (1 / 2.2) - max(b, 0) ** (1 / 2.2)) ** 2 for a, b in zip(one, other, strict=True)) ** 0.5


def unseen(figure: Figure) -> set[Text]:
    """Labels of ticks beyond the ends of an axis, or on a side that another panel labels."""
    found = set()
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        for tick, place in zip(axis.get_major_ticks(), axis.get_majorticklocs(), strict=True):
            drawn = axis.axes.get_visible() and low <= place <= high
            found |= {label for label in (tick.label1, tick.label2) if not (drawn and label.get_visible())}
    return found


def texts(report: Report, plot: str) -> list[str]:
    """Every string of a picture that overlaps no other, in order; fails where two overlap."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with rc_context(plots.STYLE | plots._colors(LIGHT)):
        figure = getattr(plots, plot)(report, LIGHT)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        shown = [one for one in figure.findobj(Text) if one.get_text().strip() and one not in unseen(figure)]
        boxes = [(one.get_text(), one.get_window_extent(canvas.get_renderer())) for one in shown if one.get_visible()]
    for text, box in boxes:
        inside = box.padded(-1)
        assert all(figure.bbox.contains(*corner) for corner in (inside.min, inside.max)), text
    for (one, here), (other, there) in itertools.combinations(boxes, 2):
        assert not here.padded(-1).overlaps(there.padded(-1)), (one, other)
    return [text for text, _ in boxes]


@pytest.mark.parametrize("name", ["every_family", "classifier", "searched"])
@pytest.mark.parametrize("plot", ["_curves", "_heat_map", "_families", "_answers", "_search"])
def test_no_text_of_a_picture_lies_on_another(name, plot):
    report = getattr(sample, name)()
    if getattr(plots, plot)(report, LIGHT) is not None:
        assert len(texts(report, plot)) > 8


def test_of_many_attacks_the_worst_are_drawn_and_the_others_are_counted():
    report = sample.every_family()
    worst = changed(report, worst="preference for restricted answers (DPO) at 1e-4, step 4")
    names, shown = trained(worst), texts(worst, "_curves")
    titles = {family.name: family.title for family in report.evidence.families}
    assert names[0] == "dpo"
    assert names[1:4] == ["full", "lora", "relative"]
    assert not {"prefilled", "pruned", "merge"} & set(names)
    assert titles["dpo"] in [text.replace("\n", " ") for text in shown]
    assert titles[names[MOST]] not in shown
    assert any(f"{len(names) - MOST} further attacks are in report.json" in text for text in shown)


def test_an_attack_that_does_not_train_has_no_cost_and_is_still_a_row():
    shown = texts(sample.every_family(), "_families")
    assert "prefilled answers" in shown
    assert "merged with the parent" not in shown


def test_a_rate_has_one_column_and_the_worst_that_was_reached_there():
    assert [half_decade(rate) for rate in (1e-5, 3e-5, 3.33e-4, 9e-4, 2.7e-3, 1.0, 10.0)] == [-10, -9, -7, -6, -5, 0, 2]
    assert [plots._rate(half) for half in (-10, -9, -7, -6, 0, 1, 2)] == [
        "1e-5",
        "3e-5",
        "3e-4",
        "1e-3",
        "1",
        "3",
        "10",
    ]
    report = sample.language_model()
    twice = tuple(sample.curve("hardened", "lora", top, 8, rate) for top, rate in ((0.8, 9e-4), (0.4, 1e-3)))
    cells = dict(plots._cells(report.model_copy(update={"curves": twice}), "hardened", ["lora"]))
    assert list(cells) == [(0, -6)]
    assert cells[0, -6][0] == pytest.approx(0.8, abs=0.01)


def test_the_map_marks_what_collapsed_and_what_did_not_run():
    report = sample.every_family()
    shown = texts(report, "_heat_map")
    crossed = [curve for curve in report.curves if curve.subject == "hardened" and curve.rate == 3e-4]
    assert sum(text.endswith(" ×") for text in shown) == len(crossed)
    assert "–" not in shown
    fewer = tuple(curve for curve in report.curves if (curve.subject, curve.family) != ("hardened", "dpo"))
    assert texts(report.model_copy(update={"curves": fewer}), "_heat_map").count("–") == 1


def test_the_settings_of_the_user_neither_change_a_plot_nor_are_changed(tmp_path):
    import matplotlib

    (tmp_path / "plain").mkdir()
    (tmp_path / "styled").mkdir()
    draw(sample.classifier(), tmp_path / "plain")
    with matplotlib.rc_context({"lines.linestyle": ":", "figure.dpi": 33}):
        draw(sample.classifier(), tmp_path / "styled")
        assert matplotlib.rcParams["figure.dpi"] == 33
    for path in (tmp_path / "plain").iterdir():
        assert path.read_bytes() == (tmp_path / "styled" / path.name).read_bytes()


def test_each_subject_is_drawn_at_the_rate_of_the_table():
    report = sample.language_model()
    drawn = best_curve(report, "original", "full")
    assert drawn is not None
    assert drawn.rate == report.evidence.families[0].best_rate_original == 1e-4


def test_without_a_rate_in_the_table_the_curve_that_serves_the_attacker_is_drawn():
    rates = {1e-3: 0.2, 3e-3: 0.6, 1e-2: 0.4}
    curves = tuple(sample.curve("scratch", "head", top, 8, rate) for rate, top in rates.items())
    drawn = best_curve(sample.classifier().model_copy(update={"curves": curves}), "scratch", "head")
    assert drawn is not None
    assert drawn.rate == 3e-3


def test_a_title_that_looks_like_mathematics_is_drawn_as_written(tmp_path):
    report = sample.language_model()
    odd = report.evidence.families[0].model_copy(update={"title": r"$\frac{"})
    families = (odd, *report.evidence.families[1:])
    changed = report.evidence.model_copy(update={"families": families})
    assert draw(report.model_copy(update={"evidence": changed}), tmp_path)


def test_a_model_probed_alone_is_not_called_hardened():
    assert labels(sample.probe_only())["hardened"] == "this model"
    assert labels(sample.language_model())["hardened"] == "hardened"


def test_answers_are_shown_before_any_attack_after_the_worst_and_after_all():
    report = sample.language_model()
    shown = dict(moments(report))
    worst = best_curve(report, "hardened", "mixed")
    assert [label.partition(", ")[2] for label in shown] == [
        *("no attack", "with benign rows mixed in", "mean of all attacks"),
        *("no attack", "with benign rows mixed in", "mean of all attacks"),
    ]
    assert shown["hardened, no attack"]["refused"] > 0.8
    assert shown["hardened, with benign rows mixed in"] == worst.points[-1].answers
    assert all(sum(shares.values()) == pytest.approx(1) for shares in shown.values())


def test_a_model_that_lost_its_utility_is_shown_as_collapsed_whatever_it_answers():
    report = sample.language_model()
    attacks = [c for c in report.curves if c.subject == "hardened"]
    lost = [c for c in attacks if c.points[-1].utility < 0.9 * c.points[0].utility]
    assert len(lost) == 1
    shown = dict(moments(report))
    assert shown["hardened, mean of all attacks"]["collapsed"] == pytest.approx(1 / len(attacks))
    assert shown["original, mean of all attacks"]["collapsed"] == 0
