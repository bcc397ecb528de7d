"""The file and the column that were named are what is read, values stay what they are, and errors repeat none."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from coterie.config import DataSpec
from coterie.errors import DataError
from coterie.training.data.documents import Documents, read_documents

SECRET = "Quillfeather"
"""Stands for a private value in broken files; no error may repeat it."""


def read(path: Path, user_column: str | None = None, **settings: Any) -> Documents:
    return read_documents([path], DataSpec(train=(path,), **settings), user_column=user_column)


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def table(folder: Path, **columns: Any) -> Path:
    path = folder / "a.parquet"
    parquet.write_table(pa.table(columns), path)
    return path


NAMES = ["notes[1]", "what?", "all*", "a::b", "[ward A]/n", "{x,y}", "~n", "%41", "zip:/a", "hf:b", " n", "n\u00e9"]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet", ".txt"])
@pytest.mark.parametrize("name", NAMES)
def test_a_file_name_is_literal_in_every_format(tmp_path: Path, name: str, suffix: str) -> None:
    written(tmp_path, "notes1.jsonl", '{"text": "other"}\n')
    written(tmp_path, "whatX.jsonl", '{"text": "other"}\n')
    path = tmp_path / f"{name}{suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    if suffix == ".parquet":
        parquet.write_table(pa.table({"text": ["mine"]}), path)
    else:
        path.write_text({".jsonl": '{"text": "mine"}', ".csv": "text\nmine\n", ".txt": "mine"}[suffix])
    assert read(path).texts == ("mine",)


@pytest.mark.parametrize(
    "rows",
    [
        "text,summary\nwhole note,short,\n",  # a separator at the end of each line
        "id,text\n1,fever, then cough\n",  # an unquoted separator inside the text
        "id,text,note\n1,whole note\n",  # a field is missing
        'id,text\n1,"fever", then cough\n',
        'id,text\n1,"fever" then cough\n',
        'id,text\n1,"never closed\n',
        "text,text\na,b\n",
    ],
)
def test_a_csv_row_never_gives_a_neighbouring_column(tmp_path: Path, rows: str) -> None:
    with pytest.raises(DataError) as caught:
        read(written(tmp_path, "a.csv", rows))
    assert caught.value.code in ("data-columns-shifted", "data-unreadable", "data-column-twice")
    assert "fever" not in str(caught.value)


def test_csv_fields_are_text_as_they_stand(tmp_path: Path) -> None:
    rows = (
        'text,n\n00001,1\n2024-01-01,x\nNone,\nNaN,2\ntrue,3\n1e5,4\n"say ""hi"", then\nleave",5\n'
        + "z" * 300_000
        + ",6\n"
    )
    expected = ("00001", "2024-01-01", "None", "NaN", "true", "1e5", 'say "hi", then\nleave', "z" * 300_000)
    assert read(written(tmp_path, "a.csv", rows)).texts == expected
    assert (
        read(written(tmp_path, "b.csv", b"\xef\xbb\xbf" + rows.replace("\n", "\r\n").encode())).texts[:2]
        == expected[:2]
    )
    assert read(written(tmp_path, "c.tsv", "text\tn\na, b\t1\n")).texts == ("a, b",)


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ('{"text": "2024-01-01 10:00:00"}', "2024-01-01 10:00:00"),
        ('{"text": "00001"}', "00001"),
        ('{"text": "null"}', "null"),
        ('{"text": "fine", "who": "\\ud83d"}', "fine"),
        ('{"text": "cut \\ud83d"}', "cut \ufffd"),
        ('{"text": "\\ud83d\\ude00"}', "\U0001f600"),
        ('{"k": 1, "k": 2, "text": "fine"}', "fine"),
        ('{"in": {"text": 1, "text": 2}, "text": "fine"}', "fine"),
        ('{"k": NaN, "m": -Infinity, "text": "fine"}', "fine"),
        ('{"k": ' + "9" * 5000 + ', "text": "fine"}', "fine"),
        ('{"text": "one\\u2028still\\u0085one"}', "one\u2028still\x85one"),
        ('{"text": "raw\u2028separator"}', "raw\u2028separator"),
    ],
)
def test_a_json_string_is_text_whatever_it_looks_like_and_other_columns_do_not_matter(
    tmp_path: Path, line: str, text: str
) -> None:
    assert read(written(tmp_path, "a.jsonl", line + "\n")).texts == (text,)
    assert read(written(tmp_path, "a.json", f"\ufeff[{line},\n{line}]")).texts == (text, text)
    assert read(written(tmp_path, "b.jsonl", f"\ufeff\n{line}\r\n\r\n{line}")).texts == (text, text)


def test_a_type_that_changes_in_another_column_stops_nothing(tmp_path: Path) -> None:
    values: list[Any] = [1, "x", None, [1], {"a": {}}, 2.5, True]
    rows = [json.dumps({"k": value, "text": f"note {i}"}) for i, value in enumerate(values * 300)]
    assert len(read(written(tmp_path, "a.jsonl", "\n".join(rows)))) == len(rows)


@pytest.mark.parametrize(
    ("name", "content", "code", "where"),
    [
        ("a.jsonl", f'{{"text": "x"}}\n{{"text": "{SECRET}"', "data-unreadable", "line 2"),
        ("a.jsonl", f'{{"text": "x"}}\n\n{{"text": "x", "text": "{SECRET}"}}', "data-column-twice", "line 3"),
        ("a.jsonl", f'{{"text": "x"}}\n{{"body": "{SECRET}"}}', "data-no-column", "line 2"),
        ("a.jsonl", f'{{"text": "x"}}\n"{SECRET}"', "data-unreadable", "line 2"),
        ("a.jsonl", f'{{"text": {{"{SECRET}": 1}}}}', "data-not-text", "line 1"),
        ("a.jsonl", '{"text": 7}', "data-not-text", "line 1"),
        ("a.jsonl", '{"text": true}', "data-not-text", "line 1"),
        ("a.jsonl", '{"text": ' + "[" * 100_000 + "]" * 100_000 + "}", "data-unreadable", "line 1"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "' + SECRET.encode() + b'\xff"}', "data-encoding", "line 2"),
        ("a.jsonl", '{"text": "x"}'.encode("utf-16"), "data-encoding", "line 1"),
        ("a.csv", f"{SECRET},42\nyes,43\n", "data-no-column", "2 columns"),
        ("a.csv", f"Text;n\n{SECRET};1\n", "data-no-column", "1 columns"),
        ("a.csv", f'text,n\nx,1\n"{SECRET}"y,2\n', "data-unreadable", "line 3"),
        ("a.csv", f"text,n\nx,1\n{SECRET}\ry,2\n", "data-unreadable", "line 3"),
        ("a.parquet", f"PAR1{SECRET}PAR1", "data-unreadable", "parquet"),
    ],
)
def test_an_error_names_file_and_place_and_repeats_no_value(
    tmp_path: Path, name: str, content: str | bytes, code: str, where: str
) -> None:
    path = written(tmp_path, name, content)
    with pytest.raises(DataError) as caught:
        read(path)
    assert caught.value.code == code
    assert str(path) in caught.value.message
    assert where in caught.value.message
    assert SECRET not in str(caught.value)
    assert "\n" not in caught.value.message


def test_plain_text_ends_lines_at_lf_and_cr_lf_alone(tmp_path: Path) -> None:
    odd = "one\u2029still\u2028still\x85still\x0cstill\x1cstill\x0bstill\rone"
    path = written(tmp_path, "a.txt", f"\ufeff{odd}\nsecond\r\n\r\nthird")
    assert read(path, split_text="line").texts == (odd, "second", "third")
    assert read(path, split_text="paragraph").texts == (f"{odd}\nsecond", "third")
    assert read(path, split_text="file").texts == (f"{odd}\nsecond\n\nthird",)


def test_parquet_reads_the_named_columns_only_and_as_text(tmp_path: Path) -> None:
    encoded = pa.array(["2024-01-01", "007", None, "x"]).dictionary_encode()
    path = table(
        tmp_path, other=pa.array([b"\xff", b"", b"a", b"b"]), text=encoded, who=pa.array([1.0, 2.0, 1.0, 2.0])
    )
    documents = read(path, user_column="who")
    assert documents.texts == ("2024-01-01", "007", "x")
    assert documents.users == ("1", "2", "2")
    with pytest.raises(DataError, match="holds bytes, not text"):
        read(path, text="other")
    with pytest.raises(DataError, match="its columns are: other, text, who"):
        read(path, text="body")


def test_an_id_is_one_user_however_it_is_written(tmp_path: Path) -> None:
    ids = {"7": "7", '"7"': "7", "7.0": "7", '"7.0"': "7", "[7]": "7", '" 7"': " 7", '"07"': "07", '"ann"': "ann"}
    lines = "\n".join(f'{{"text": "x", "who": {who}}}' for who in ids)
    assert read(written(tmp_path, "a.jsonl", lines), user_column="who").users == tuple(ids.values())
    rows = "text,who\n" + "x,7\n" * 2 + "x,7.0\nx,07\n"
    assert read(written(tmp_path, "a.csv", rows), user_column="who").users == ("7", "7", "7", "07")
    huge = "9" * 5000
    assert read(written(tmp_path, "b.jsonl", f'{{"text": "x", "who": {huge}}}'), user_column="who").users == (huge,)


@pytest.mark.parametrize("who", ["null", "NaN", '""', '"  "'])
def test_a_missing_user_is_missing_in_every_form(tmp_path: Path, who: str) -> None:
    with pytest.raises(DataError) as caught:
        read(written(tmp_path, "a.jsonl", f'{{"text": "x", "who": {who}}}'), user_column="who")
    assert caught.value.code == "data-no-user"


@pytest.mark.parametrize("who", ["7.5", "true", '{"id": 7}', '{"a": 7, "b": 8}', "[true]", "Infinity"])
def test_what_is_no_id_is_refused(tmp_path: Path, who: str) -> None:
    with pytest.raises(DataError) as caught:
        read(written(tmp_path, "a.jsonl", f'{{"text": "x", "who": {who}}}'), user_column="who")
    assert caught.value.code == "data-user-id"


@pytest.mark.parametrize(
    "ids",
    [pa.array([10**8, 2], pa.date32()), pa.array([1, 2], pa.timestamp("ns", tz="No/Where"))],
)
def test_a_value_that_python_cannot_hold_is_one_sentence(tmp_path: Path, ids: Any) -> None:
    with pytest.raises(DataError, match="cannot be read as parquet") as caught:
        read(table(tmp_path, text=["one", "two"], who=ids), user_column="who")
    assert caught.value.code == "data-unreadable"


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le"])
@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.jsonl"])
def test_ascii_in_utf16_is_not_read_as_letters_and_zeros(tmp_path: Path, encoding: str, name: str) -> None:
    path = written(tmp_path, name, f"text\n{SECRET} went home\n".encode(encoding))
    with pytest.raises(DataError) as caught:
        read(path)
    assert caught.value.code == "data-encoding"
    assert "line 1" in caught.value.message
    assert SECRET not in str(caught.value)


def test_a_quote_between_tabs_that_would_swallow_rows_is_refused(tmp_path: Path) -> None:
    rows = f'id\ttext\n1\t"{SECRET} said\n2\tand then\n3\tno more"\n'
    with pytest.raises(DataError) as caught:
        read(written(tmp_path, "a.tsv", rows))
    assert caught.value.code == "data-rows-merged"
    assert "line 2" in caught.value.message
    assert SECRET not in str(caught.value)
    assert read(written(tmp_path, "b.tsv", 'id\ttext\n1\t"two\nlines"\n2\t"a ""word"""\n')).texts == (
        "two\nlines",
        'a "word"',
    )


@pytest.mark.parametrize("way", ["name", "link", "hard link", "detour"])
def test_a_file_that_is_named_twice_is_refused(tmp_path: Path, way: str) -> None:
    first = written(tmp_path, "a.jsonl", '{"text": "once"}\n')
    second = {
        "name": first,
        "link": tmp_path / "link.jsonl",
        "hard link": tmp_path / "hard.jsonl",
        "detour": tmp_path / "x" / ".." / "a.jsonl",
    }[way]
    (tmp_path / "x").mkdir()
    if way == "link":
        second.symlink_to(first)
    if way == "hard link":
        second.hardlink_to(first)
    other = written(tmp_path, "b.jsonl", '{"text": "once"}\n')
    with pytest.raises(DataError) as caught:
        read_documents([first, other, second], DataSpec(train=(first,)))
    assert caught.value.code == "data-file-twice"
    assert len(read_documents([first, other], DataSpec(train=(first,)))) == 2


@pytest.mark.parametrize(("module", "named"), [("gzip", "gzip"), ("bz2", "bzip2"), ("lzma", "xz")])
@pytest.mark.parametrize("suffix", ["", ".packed"])
def test_a_compressed_file_is_said_to_be_one(tmp_path: Path, module: str, named: str, suffix: str) -> None:
    content = importlib.import_module(module).compress(json.dumps({"text": SECRET}).encode())
    path = written(tmp_path, f"rows.jsonl{suffix}", content)
    with pytest.raises(DataError, match=rf"compressed \({named}\)") as refused:
        read(path, format="jsonl")
    assert refused.value.code == "data-format"
