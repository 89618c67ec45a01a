"""The figures of many models against what they are given."""

from minimoe.course import figures
from minimoe.course.figures.fleet import lineage_tree
from minimoe.fleet.forest import Forest, Node


def test_lineage_tree():
    nodes = (
        Node("root", None, None, False),
        Node("child", "root", 0.9, True),
        Node("grandchild", "child", 0.5, False),
        Node("alone", None, None, False),
    )
    drawn, data = lineage_tree(Forest(nodes))
    assert data["name"] == ["root", "child", "grandchild", "alone"]
    assert data["parent"] == ["", "root", "child", ""]
    assert (data["x"], data["y"]) == ([0, 1, 2, 0], [0, 1, 2, 3])
    (axes,) = drawn.axes
    links = [line for line in axes.lines if line.get_linestyle() != "None"]
    assert [line.get_linestyle() for line in links] == ["-", ":"]  # told, and not told
    assert [text.get_text() for text in axes.texts] == ["root", "child  0.90", "grandchild  0.50", "alone"]
    assert (
        drawn.get_label()
        == "2 trees of models, with the roots root, alone. Links: child from root, grandchild from child."
    )


def test_recall_of_another_table():
    row = {"law": "a law", "size": 100.0, "recall_20": 0.995, "worst": "int4", "worst_recall_20": 0.5}
    timed = row | {"processor_seconds": 0.5, "megabytes": 1.0}
    drawn, data = figures.fleet_recall([timed, row | {"size": 1000.0, "processor_seconds": None, "megabytes": None}])
    assert data["size"] == [100.0, 1000.0] and data["processor_seconds"] == [0.5, ""]
    left, right = drawn.axes
    assert list(left.lines[0].get_xdata()) == [100.0, 1000.0] and list(right.lines[0].get_ydata()) == [0.5]
