"""The report stands alone, shows text as text, and is written whole; its pictures are sound PNGs."""

from __future__ import annotations

import base64
import errno
import io
import math
import os
import re
from html.parser import HTMLParser

import matplotlib.image
import numpy as np
import pytest

from telos.core.errors import Failure, UsageError
from telos.evaluation import plots
from telos.evaluation.report import Completion, Report, Sample, cell_text
from telos.evaluation.statistics import Interval

PNG = plots.length_histogram({"a": [1, 2, 3]})
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Collects tags, attributes and text, and checks that tags are balanced."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(source)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def values(self, name):
        return [value for _, attribute, value in self.attributes if attribute == name]


def _full_report() -> Report:
    report = Report("Run <of> today & tomorrow")
    report.heading("First").paragraph("A *plain* paragraph with `ticks`.")
    report.table("Scores", ["model", "gold", "note"], [["dpo", Interval(0.5, 0.4, 0.6, 20), "a|b"], ["ppo", None, "<b>"]])
    report.picture("Lengths, all", PNG, "Lengths of the answers.", 'A "histogram" [of] lengths')
    report.heading("Second").heading("Third")
    report.samples(
        "Two prompts.",
        [Sample("def f():\n\treturn 1", [Completion("dpo", "<script>alert(1)</script>", {"gold": 0.25}), Completion("ppo", "")])],
    )
    report.verdict("Over-optimised?", "yes", "Gold fell.", "bad").warning("One seed only.").summary("First sentence.", "Second sentence.")
    return report.command("telos train dpo --beta 0.1").facts(
        "Settings", {"dpo": {"beta": 0.1, "lr": 1.23456789e-5}, "seeds": [1, 2], "empty": {}}
    )


def test_html_loads_nothing_from_outside():
    source = _full_report().html()
    page = Page(source)
    assert page.values("src")
    assert all(value.startswith("data:image/png;base64,") for value in page.values("src"))
    assert page.values("href")
    ids = set(page.values("id"))
    assert all(value.startswith("#") and value[1:] in ids for value in page.values("href"))
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(page.tags)
    assert not re.search(r"url\s*\(|@import", source)
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert any("default-src 'none'" in value for value in page.values("content"))


def test_pictures_inside_the_html_are_the_given_bytes():
    uri = Page(_full_report().html()).values("src")[0]
    assert base64.b64decode(uri.partition(",")[2]) == PNG


@pytest.mark.parametrize(
    "attack", ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "</pre></article><h1>x", "{{ 7 * 7 }}", "&lt;b&gt;"]
)
def test_text_from_models_and_data_stays_text_everywhere(attack):
    report = Report(attack).summary(attack).warning(attack).heading(attack).paragraph(attack).command(attack)
    report.verdict(attack, attack, attack).table(attack, [attack], [[attack]]).picture("x", PNG, attack, attack)
    report.samples(attack, [Sample(attack, [Completion(attack, attack, {attack: attack})], title=attack)]).facts(attack, {attack: attack})
    plain = Report("t").summary("t").warning("t").heading("t").paragraph("t").command("t")
    plain.verdict("t", "t", "t").table("t", ["t"], [["t"]]).picture("x", PNG, "t", "t")
    plain.samples("t", [Sample("t", [Completion("t", "t", {"t": "t"})], title="t")]).facts("t", {"t": "t"})
    page, expected = Page(report.html()), Page(plain.html())
    assert page.tags == expected.tags
    assert [a[:2] for a in page.attributes] == [a[:2] for a in expected.attributes]
    assert page.text.count(attack) >= 15
    assert attack in page.values("alt")


def test_markdown_pictures_resolve_to_the_same_bytes(tmp_path):
    html, markdown = _full_report().write(tmp_path / "run")
    links = re.findall(r"!\[(?:[^\]\\]|\\.)*\]\(([^)]+)\)", markdown.read_text(encoding="utf-8"))
    assert links == ["report/lengths-all.png"]
    assert (markdown.parent / links[0]).read_bytes() == PNG
    assert html.name == "report.html"
    assert html.parent == markdown.parent == tmp_path / "run"


def test_markdown_keeps_text_from_becoming_markup():
    text = _full_report().markdown()
    assert "# Run &lt;of> today &amp; tomorrow\n" in text
    assert r"A \*plain\* paragraph with \`ticks\`." in text
    assert r"| dpo | 0.500 \[0.400, 0.600\] | a\|b |" in text
    assert "| ppo | – | &lt;b> |" in text
    assert "```text\n<script>alert(1)</script>\n```" in text
    assert "\\# no heading" in Report("t").paragraph("# no heading").markdown()
    assert "1\\. no list" in Report("t").paragraph("1. no list").markdown()


def test_markdown_fence_is_longer_than_any_run_of_backticks_inside():
    text = Report("t").samples("s", [Sample("a ```` b", [])]).markdown()
    assert "\n`````text\na ```` b\n`````\n" in text


def test_level_and_n_of_intervals_are_stated_under_the_table():
    report = Report("t").table("x", ["a"], [[Interval(0.5, 0.4, 0.6, 20)], [Interval(0.5, 0.4, 0.6, 50)]])
    assert "In brackets: 95 % intervals, n = 20 to 50." in Page(report.html()).text
    assert "In brackets: 95 % intervals, n = 20 to 50." in report.markdown()


def test_empty_answers_and_missing_numbers_are_shown_as_such():
    page = Page(_full_report().html())
    assert "(empty)" in page.text
    assert cell_text(None) == "–"
    assert cell_text(math.nan) == "NaN"
    assert cell_text(np.float32(0.5)) == "0.5"
    assert cell_text(True) == "yes"
    assert cell_text(np.bool_(False)) == "no"
    assert cell_text(1234567) == "1234567"
    assert cell_text([]) == "–"


def test_settings_are_exact_so_that_the_run_can_be_repeated():
    text = Page(_full_report().html()).text
    assert "1.23456789e-05" in text
    assert "dpo.beta" in text
    assert "1, 2" in text


def test_verdicts_stand_before_the_sections_whenever_they_were_added():
    text = Page(_full_report().html()).text
    assert text.index("Over-optimised?") < text.index("One seed only.") < text.index("First sentence.") < text.index("Scores")
    assert text.index("Scores") < text.index("telos train dpo")


def test_whitespace_of_code_is_kept_and_hidden_characters_are_shown(tmp_path):
    sample = Sample("\n\tindented\n", [Completion("m", "a\x00b\x1b[31m\u202egpj\ud800\x85")])
    report = Report("title \ud800").samples("s", [sample])
    html, markdown = report.write(tmp_path)
    assert '<pre dir="auto">\n\n\tindented\n</pre>' in html.read_text(encoding="utf-8")
    assert "a␀b␛[31m<U+202E>gpj\ufffd<U+0085>" in Page(html.read_text(encoding="utf-8")).text
    assert "a␀b␛[31m<U+202E>gpj\ufffd<U+0085>" in markdown.read_text(encoding="utf-8")
    for path in (html, markdown):
        assert not re.search("[\x00\x1b\u202e\x85]", path.read_text(encoding="utf-8"))


def test_a_failed_write_leaves_the_old_report_and_no_fragments(tmp_path, monkeypatch):
    Report("old").write(tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(Failure, match=r"report\.md: No space left on device"):
        Report("new").write(tmp_path)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_a_file_in_place_of_the_folder_is_named_in_the_error(tmp_path):
    (tmp_path / "run").write_text("x")
    with pytest.raises(Failure, match="cannot write the report file"):
        Report("t").write(tmp_path / "run")


def test_writing_leaves_no_temporary_files(tmp_path):
    _full_report().write(tmp_path)
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()) == [
        "report.html",
        "report.md",
        "report/lengths-all.png",
    ]


def test_reports_of_the_same_parts_are_the_same_bytes():
    assert _full_report().html() == _full_report().html()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Report("t").table("x", ["a", "b"], [[1, 2], [1]]), "row 2 has 1 cells and there are 2 headers"),
        (lambda: Report("t").picture("x", b"GIF89a", "c", "alt"), "not a PNG"),
        (lambda: Report("t").picture("x", PNG, "c", " "), "alternative text"),
        (lambda: Report("t").picture("a b", PNG, "c", "d").picture("A-B", PNG, "c", "d"), "two pictures are called 'a-b'"),
        (lambda: Report("t").picture("../", PNG, "c", "d"), "no letter or digit"),
        (lambda: Report("t").verdict("q", "a", "t", "great"), "good, bad, neutral"),  # type: ignore[arg-type]
        (lambda: Report(" "), "needs a title"),
        (lambda: plots.win_rates({}, "sft"), "rates is empty"),
        (lambda: plots.learning_curves([plots.Curve("a", [1, 2], [1.0, np.nan])], "loss"), "y of a: 1 of 2"),
        (lambda: plots.learning_curves([plots.Curve("a", [1, 2], [1.0])], "loss"), "differ in length"),
    ],
)
def test_unusable_parts_are_refused_by_name(call, message):
    with pytest.raises(UsageError, match=message):
        call()


def test_a_picture_name_cannot_leave_the_folder(tmp_path):
    Report("t").picture("../../etc/x", PNG, "c", "d").write(tmp_path)
    assert (tmp_path / "report" / "etc-x.png").exists()


def _pixels(png: bytes) -> np.ndarray:
    return np.round(255 * matplotlib.image.imread(io.BytesIO(png))[..., :3]).astype(int)


def _has_colour(image: np.ndarray, colour: str) -> bool:
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return bool((np.abs(image - wanted).max(axis=-1) <= 2).sum() > 20)


def _all_plots(shift: float) -> dict[str, bytes]:
    x = np.arange(5.0)
    bars = [Interval(v + shift, v + shift - 0.1, v + shift + 0.1, 30) for v in x]
    open_bars = [Interval(v, -math.inf, math.inf, 1) for v in x]
    return {
        "reward": plots.reward_against_kl(
            [plots.RewardCurves("dpo", x, bars, bars, fit=(x, x)), plots.RewardCurves(r"_cost $\frac$", x, open_bars, open_bars)]
        ),
        "learning": plots.learning_curves([plots.Curve("a", x, x + shift, x - 1, x + 2), plots.Curve("b $_", x, x**2)], "Loss [nats]"),
        "wins": plots.win_rates({"dpo": Interval(0.5 + shift / 10, 0.4, 0.7, 30), "ppo": Interval(1.0, -math.inf, math.inf, 1)}, "sft"),
        "lengths": plots.length_histogram({"a": x + 3 * shift, "b": np.arange(100)}),
    }


def test_pictures_are_wide_white_and_show_every_series():
    for name, png in _all_plots(0.0).items():
        image = _pixels(png)
        assert image.shape[1] == 1080, name
        assert (image[0] == 255).all(), name
        assert _has_colour(image, "#0072B2"), name
        assert _has_colour(image, "#D55E00") == (name != "wins"), name


def test_pictures_follow_the_data_and_repeat_to_the_byte():
    first, again, moved = _all_plots(0.0), _all_plots(0.0), _all_plots(0.5)
    for name in first:
        assert first[name] == again[name], name
        assert first[name] != moved[name], name


def test_plotting_changes_no_global_style():
    before = dict(matplotlib.rcParams)
    _all_plots(0.0)
    assert dict(matplotlib.rcParams) == before


def test_bins_of_whole_lengths_are_whole_and_hold_every_value():
    edges = plots._bins(np.arange(101.0))
    assert np.all(np.diff(edges) == 3)
    assert edges[0] == -0.5
    assert np.histogram(np.arange(101.0), edges)[0].sum() == 101
    assert np.histogram([0.5, 0.7], plots._bins(np.array([0.5, 0.7])))[0].sum() == 2
