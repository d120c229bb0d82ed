import csv

import numpy as np
import pytest
from matplotlib.figure import Figure

from densenet_jax.analysis import ablation, ablation_plots
from densenet_jax.runs import directory as runs
from tests.run_directories import write_run


def _read(tmp_path, *settings):
    """Runs with (errors, changes) each."""
    return [
        runs.read_run(write_run(tmp_path / f"run{i}", errors, **changes))
        for i, (errors, changes) in enumerate(settings)
    ]


def _grid(tmp_path):
    """Growth rate {6, 12} x compression {0.5, 1}, two seeds each."""
    settings = [
        (
            [90, 50, 10 * k + compression + seed],
            {
                "model.growth_rate": k,
                "model.compression": compression,
                "seed": seed,
            },
        )
        for k in (6, 12)
        for compression in (0.5, 1.0)
        for seed in (0, 1)
    ]
    return ablation.group(_read(tmp_path, *settings))[0]


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved."""
    saved = []
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *_, **__: saved.append(self)
    )
    return saved


def test_seeds_are_one_group(tmp_path):
    groups = _grid(tmp_path)
    assert sorted(g.label for g in groups) == [
        f"compression={c}, growth_rate={k}" for c in (0.5, 1.0) for k in (12, 6)
    ]
    assert [len(g.runs) for g in groups] == [2, 2, 2, 2]
    (group,) = (
        g for g in groups if g.label == "compression=1.0, growth_rate=6"
    )
    assert group.settings == {"model.compression": 1.0, "model.growth_rate": 6}
    # The sample standard deviation of 61 and 62; best: 50 and 50.
    np.testing.assert_allclose(group.final, (61.5, np.sqrt(0.5)))
    np.testing.assert_allclose(group.best, (50, 0), atol=1e-12)


def test_where_data_lie_sets_nothing_apart(tmp_path):
    finished = _read(
        tmp_path,
        ([9, 5, 7], {"dataset.data_dir": "/a"}),
        ([9, 5, 8], {"dataset.data_dir": "/b", "seed": 1}),
    )
    ((group,), excluded) = ablation.group(finished)
    assert (group.label, len(group.runs), excluded) == ("all", 2, {})


def test_the_same_run_twice_is_one_sample(tmp_path):
    finished = _read(tmp_path, ([9, 5, 7], {}), ([9, 5, 7], {}))
    ((group,), excluded) = ablation.group(finished)
    assert group.runs == finished[:1]
    assert group.final[1] is None
    assert excluded == {tmp_path / "run1": "the config and seed of run0 again"}


@pytest.mark.parametrize(
    ("bottleneck_width", "compression", "variant"),
    [
        (0, 1.0, "DenseNet"),
        (4, 1.0, "DenseNet-B"),
        (0, 0.5, "DenseNet-C"),
        (4, 0.5, "DenseNet-BC"),
    ],
)
def test_variants_have_the_papers_names(
    tmp_path, bottleneck_width, compression, variant
):
    changes = {
        "model.bottleneck_width": bottleneck_width,
        "model.compression": compression,
    }
    ((group,), _) = ablation.group(_read(tmp_path, ([9, 5, 7], changes)))
    assert group.variant == variant


def test_table(tmp_path):
    finished = _read(
        tmp_path,
        ([9, 5, 7], {"seed": 0}),
        ([9, 5, 8], {"seed": 1}),
        ([9, 4, 3], {"model.growth_rate": 6}),
    )
    groups, _ = ablation.group(finished)
    _, _, small, large = ablation.table(groups).splitlines()
    assert small.startswith("| growth_rate=6 | DenseNet-BC | ")
    assert small.endswith(" | 3.00 | 3.00 | 1 |")
    assert large.startswith("| growth_rate=None | DenseNet-BC | ")
    assert large.endswith(" | 7.50 ± 0.71 | 5.00 ± 0.00 | 2 |")
    assert f"| {finished[2].parameters:,} | " in small


def test_csv_has_every_run_and_no_number_of_what_is_left_out(tmp_path):
    groups, _ = ablation.group(_read(tmp_path, ([9, 5, 7], {"seed": 4})))
    ablation.write_csv(
        groups, {tmp_path / "other": "failed: x"}, tmp_path / "report.csv"
    )
    with (tmp_path / "report.csv").open(newline="") as file:
        run, left_out = csv.DictReader(file)
    assert run["seed"] == "4"
    assert run["block_layers"] == "4-4-4"
    assert float(run["last_error_percent"]) == pytest.approx(7)
    assert float(run["best_error_percent"]) == pytest.approx(5)
    assert run["left_out"] == ""
    assert left_out.pop("run") == str(tmp_path / "other")
    assert left_out.pop("left_out") == "failed: x"
    assert set(left_out.values()) == {""}


def test_costs(tmp_path, figures):
    groups = _grid(tmp_path)
    ablation_plots.plot_costs(groups, tmp_path / "costs.png")
    for axes, attribute in zip(
        figures[0].axes, ("parameters", "multiply_adds")
    ):
        assert axes.get_xscale() == "log"
        drawn = {
            container.get_label(): container.lines[0].get_xydata()
            for container in axes.containers
        }
        assert set(drawn) == {"DenseNet-B", "DenseNet-BC"}
        for variant, points in drawn.items():
            expected = sorted(
                (getattr(g, attribute), g.final[0])
                for g in groups
                if g.variant == variant
            )
            np.testing.assert_allclose(points, expected)


@pytest.mark.parametrize("growth_rates", [(11, 12), (6, 12), (4, 40)])
def test_costs_are_marked(tmp_path, figures, growth_rates):
    finished = _read(
        tmp_path,
        *(([9, 5, 7], {"model.growth_rate": k}) for k in growth_rates),
    )
    groups, _ = ablation.group(finished)

    ablation_plots.plot_costs(groups, tmp_path / "costs.png")

    for axes in figures[0].axes:
        low, high = axes.get_xlim()
        inside = [t for t in axes.get_xticks() if low <= t <= high]
        assert 3 <= len(inside) <= 8


def test_curves_are_means_over_seeds(tmp_path, figures):
    finished = _read(
        tmp_path, ([9, 5, 7], {"seed": 0}), ([7, 5, 8], {"seed": 1})
    )
    groups, _ = ablation.group(finished)
    ablation_plots.plot_curves(groups, tmp_path / "curves.png")
    _, error = figures[0].axes
    (mean,) = (line.get_ydata() for line in error.lines)
    np.testing.assert_allclose(mean, [8, 5, 7.5])
    (band,) = error.collections
    (outline,) = band.get_paths()
    assert outline.get_extents().y0 == pytest.approx(5)
    assert outline.get_extents().y1 == pytest.approx(9)


@pytest.mark.parametrize(
    "changes",
    [
        {"growth_rate": 6},
        {
            "block_layers": (7, 7, 7),
            "bottleneck_width": 4,
            "compression": 0.5,
            "dropout_rate": 0.2,
        },
    ],
)
def test_the_legend_of_curves_fits_below_them(tmp_path, figures, changes):
    changes = {f"model.{key}": value for key, value in changes.items()}
    finished = _read(tmp_path, ([9, 5, 7], {}), ([7, 5, 8], changes))
    groups, _ = ablation.group(finished)

    ablation_plots.plot_curves(groups, tmp_path / "curves.png")

    (figure,) = figures
    figure.draw_without_rendering()
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
    assert figure.bbox.y0 <= box.y0
    assert box.y1 < min(axes.bbox.y0 for axes in figure.axes)


def test_heat_map(tmp_path, figures):
    groups = _grid(tmp_path)
    assert ablation_plots.plot_heat_map(groups, tmp_path / "heat_map.png")
    axes, _ = figures[0].axes
    # Rows are compressions, columns growth rates.
    np.testing.assert_allclose(
        axes.images[0].get_array(), [[61, 121], [61.5, 121.5]]
    )
    assert [t.get_text() for t in axes.get_xticklabels()] == ["6", "12"]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["0.5", "1.0"]


def test_no_heat_map_of_what_varies_in_more(tmp_path, figures):
    finished = _read(
        tmp_path,
        ([9, 5, 7], {"model.growth_rate": 6, "model.compression": 0.5}),
        (
            [9, 5, 7],
            {
                "model.growth_rate": 12,
                "model.compression": 1.0,
                "model.bottleneck_width": 0,
            },
        ),
    )
    groups, _ = ablation.group(finished)
    path = tmp_path / "heat_map.png"
    assert not ablation_plots.plot_heat_map(groups, path)
    assert not ablation_plots.plot_heat_map(groups[:1], path)
    assert not figures
