"""Labelled texts in tables: every layout in use, and lines that are no good."""

import pytest

from pockjax.data import Corpus, read_table

CORPUS = Corpus(("fine, isn't it", 'a "bad" one', "so so"), (2, 0, 1), ("bad", "fair", "good"))
FILES = {
    "comma.csv": 'id,text,label\n7,"fine, isn\'t it",good\n8,"a ""bad"" one",bad\n9,so so,fair\n',
    "tab.tsv": 'id\ttext\tlabel\n7\tfine, isn\'t it\tgood\n8\ta "bad" one\tbad\n9\tso so\tfair\n',
    "lines.jsonl": '{"text": "fine, isn\'t it", "label": "good"}\n\n'
    '{"label": "bad", "text": "a \\"bad\\" one", "id": 8}\n{"text": "so so", "label": "fair"}\n',
}
WITHOUT_HEADER = {
    "comma.csv": (FILES["comma.csv"].partition("\n")[2], {"text": 1, "label": 2}),
    "tab.tsv": (FILES["tab.tsv"].partition("\n")[2], {"text": 1, "label": 2}),
    "lines.txt": (
        'good fine, isn\'t it\nbad a "bad" one\nfair so so\n',
        {"text": 1, "label": 0, "delimiter": " "},
    ),
}


def write(folder, name, text):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_columns_by_name(tmp_path, name, end, mark):
    path = tmp_path / name
    path.write_bytes((mark + FILES[name].replace("\n", end)).encode())
    assert read_table(path, text="text", label="label") == CORPUS


@pytest.mark.parametrize("name", WITHOUT_HEADER)
def test_columns_by_number(tmp_path, name):
    text, columns = WITHOUT_HEADER[name]
    assert read_table(write(tmp_path, name, text), **columns) == CORPUS


def test_pairs_of_texts(tmp_path):
    path = write(tmp_path, "a.tsv", "same\tone\ttwo\n1\ta b\tb a\n0\tx\ty\n")
    corpus = read_table(path, text=("one", "two"), label="same")
    assert corpus.texts == (("a b", "b a"), ("x", "y")) and corpus.labels == (1, 0)


def test_classes_of_the_training_data_number_those_of_the_test_data(tmp_path):
    path = write(tmp_path, "a.tsv", "b\tx\na\ty\n")
    corpus = read_table(path, text=1, label=0, classes=("c", "b", "a"))
    assert corpus.labels == (1, 2) and corpus.classes == ("c", "b", "a")
    with pytest.raises(ValueError, match=r"a\.tsv:2: label 'a' is none of b, c"):
        read_table(path, text=1, label=0, classes=("b", "c"))


def test_text_over_several_lines(tmp_path):
    text = 'text,label\n"one\ntwo",a\nthree,b,c\n'
    with pytest.raises(ValueError, match=r"a\.csv:4: 3 columns instead of 2"):
        read_table(write(tmp_path, "a.csv", text), text="text", label="label")
    corpus = read_table(write(tmp_path, "a.csv", text[:-3] + "\n"), text="text", label="label")
    assert corpus.texts == ("one\ntwo", "three")


@pytest.mark.parametrize(
    ("name", "text", "columns", "message"),
    [
        ("a.csv", "x,y\n1,2\n", ("x", "z"), r"a\.csv:1: no column 'z'; there are: x, y"),
        ("a.csv", "1,2\n3\n", (0, 1), r"a\.csv:2: 1 columns instead of 2"),
        ("a.csv", "1,2\n", (0, 2), r"a\.csv:1: 2 columns instead of 3"),
        ("a.csv", 'x,y\n1,"2\n3,4\n', ("x", "y"), r"a\.csv:2: unexpected end of data"),
        ("a.tsv", "x\ty\n1\t2\n3\t4\t5\n", ("x", "y"), r"a\.tsv:3: 3 columns instead of 2"),
        ("a.jsonl", '{"x": 1, "y": 2}\n{"x": 1}\n', ("x", "y"), r"a\.jsonl:2: no 'y'"),
        ("a.jsonl", '{"x": 1, "y": 2}\n{"x": \n', ("x", "y"), r"a\.jsonl:2: not JSON"),
        ("a.jsonl", "[1, 2]\n", ("x", "y"), r"a\.jsonl:1: a JSON object was expected"),
        ("a.csv", "x,y\n", ("x", "y"), r"a\.csv has no texts"),
        ("a.csv", "", ("x", "y"), r"a\.csv:1: no column"),
        ("a.txt", "x y\n", (0, 1), "give its delimiter"),
        ("a.csv", "x,y\n", ("x", 1), "all names or all numbers"),
    ],
)
def test_bad_input_is_named_with_its_line(tmp_path, name, text, columns, message):
    with pytest.raises(ValueError, match=message):
        read_table(write(tmp_path, name, text), text=columns[0], label=columns[1])


def test_other_encodings_are_named_or_given(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_bytes("x\tgut\ny\tschön\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.tsv:2: not utf-8"):
        read_table(path, text=1, label=0)
    assert read_table(path, text=1, label=0, encoding="latin-1").texts == ("gut", "schön")


@pytest.mark.parametrize(
    ("file", "settings", "count", "classes"),
    [
        ("sst2/stsa.binary.train", {"text": 1, "label": 0, "delimiter": " "}, 6920, 2),
        (
            "trec/TREC.train.all",
            {"text": 1, "label": 0, "delimiter": " ", "encoding": "latin-1"},
            5452,
            6,
        ),
        ("cola/in_domain_train.tsv", {"text": 3, "label": 1}, 8551, 2),
        (
            "mrpc/msr_paraphrase_train.txt",
            {"text": ("#1 String", "#2 String"), "label": "Quality", "delimiter": "\t"},
            4076,
            2,
        ),
        ("banking77/test.csv", {"text": "text", "label": "category"}, 3080, 77),
    ],
)
def test_published_data(shared_data, file, settings, count, classes):
    corpus = read_table(shared_data / "text" / file, **settings)
    assert (len(corpus), len(corpus.classes)) == (count, classes)
