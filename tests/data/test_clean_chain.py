"""Chains of operators: the shipped ones say what the documentation says, a wrong one is refused, downloads are left out."""

import re

import pytest

from megatron_steel.data.clean import chain
from megatron_steel.data.clean.chain import Operator
from megatron_steel.errors import SteelError


def names(name):
    return [operator.name for operator in chain.load(name).operators]


def parameters(name, operator):
    return next(found.parameters for found in chain.load(name).operators if found.name == operator)


def test_the_original_chains_are_complete():
    assert len(names("text-original")) == 22
    assert len(names("code-original")) == 15
    assert parameters("text-original", "average_line_length_filter") == {"min_len": 10, "max_len": 150}
    assert parameters("text-original", "document_simhash_deduplicator")["tokenization"] == "space"
    assert parameters("code-original", "word_repetition_filter") == {"rep_len": 10, "max_ratio": 0.357}


@pytest.mark.parametrize("name", ["text", "code"])
def test_corrected_chains_have_no_operator_that_damages(name):
    damage = {
        "clean_html_mapper", "clean_copyright_mapper", "fix_unicode_mapper", "punctuation_normalization_mapper",
        "remove_repeat_sentences_mapper", "whitespace_normalization_mapper",
    }  # fmt: skip
    assert not damage & set(names(name))
    assert damage & set(names(f"{name}-original")), "and the original chain has it"
    assert parameters(name, "document_simhash_deduplicator")["tokenization"] == "character"


def test_words_between_spaces_are_not_counted_in_text():
    assert "words_num_filter" not in names("text")
    assert "max_len" not in parameters("text", "average_line_length_filter")


@pytest.mark.parametrize("name", ["text", "code"])
def test_patterns_end_where_the_address_ends(name):
    link = parameters(name, "clean_links_mapper")["pattern"]
    assert re.sub(link, "", "见 https://a.example/b?c=1，然后继续。") == "见 ，然后继续。"
    assert re.sub(link, "", "见http://a.example/b然后继续") == "见然后继续"
    for code in ("rows[start:end]", "case first:second", "std::sort(a)", "a.b.py/c", "key:value", "时间:12:30"):
        assert re.sub(link, "", code) == code
    email = parameters(name, "clean_email_mapper")["pattern"]
    assert re.sub(email, "", "写信给 a.b@c.example.org。") == "写信给 。"
    for code in ("weights@x.sum()", "@decorator.call", "a@b"):
        assert re.sub(email, "", code) == code


def test_ip_addresses_are_whole_numbers():
    ip = parameters("text", "clean_ip_mapper")["pattern"]
    assert re.sub(ip, "", "主机10.0.0.255 和 192.168.1.1.") == "主机 和 ."
    assert re.sub(ip, "", "地址 2001:0db8:0000:0000:0000:0000:1428:57ab") == "地址 "
    for text in ("第 3.1.4.1.5 节", "v1.2.3.4", "1.2.3.999", "圆周率 3.14159"):
        assert re.sub(ip, "", text) == text


def test_operators_that_download_are_left_out_and_listed(tmp_path):
    todo = chain.runnable(chain.load("text"), None, False)
    assert [str(operator) for operator, _ in todo.left_out] == ["perplexity_filter"]
    assert len(todo.operators) == len(chain.load("text").operators) - 1
    todo = chain.runnable(chain.load("code"), tmp_path, False)
    assert [str(operator) for operator, _ in todo.left_out] == ["alphanumeric_filter (tokens)"]
    assert [o.name for o in todo.operators].count("alphanumeric_filter") == 1, "the one by character stays"


def test_local_files_bring_them_back(tmp_path):
    for name in ("zh.sp.model", "zh.arpa.bin"):
        (tmp_path / name).touch()
    todo = chain.runnable(chain.load("text"), tmp_path, False)
    assert todo == chain.load("text")


def test_ray_has_another_deduplicator():
    todo = chain.runnable(chain.load("text"), None, True)
    assert todo.operators[-1].name == "ray_bts_minhash_deduplicator"
    assert todo.operators[-1].parameters["tokenization"] == "character"
    assert [operator.name for operator, _ in todo.left_out][-1] == "document_simhash_deduplicator"


def test_a_file_of_operators(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("process:\n- text_length_filter: {min_len: 3}\n- clean_email_mapper:\n- clean_ip_mapper\n")
    mine = chain.load(str(path))
    assert mine.name == "mine"
    assert mine.operators == (
        Operator("text_length_filter", {"min_len": 3}), Operator("clean_email_mapper", {}), Operator("clean_ip_mapper", {})
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("process: [", "not YAML"),
        ("np: 4\nprocess: [a]", "one key, `process`"),
        ("process: {a: 1}", "a list of operators"),
        ("- a", "one key, `process`"),
        ("process: []", "no operators"),
        ("process: [{a: 1, b: 2}]", "not an operator"),
        ("process: [{a: 1}]", "not an operator"),
        ("process: [3]", "not an operator"),
    ],
)
def test_another_form_is_refused(tmp_path, text, says):
    path = tmp_path / "chain.yaml"
    path.write_text(text)
    with pytest.raises(SteelError, match=says):
        chain.load(str(path))


def test_an_unknown_chain_names_the_shipped_ones():
    with pytest.raises(SteelError, match="text-original"):
        chain.load("txt")


def test_nothing_left_is_an_error(tmp_path):
    path = tmp_path / "chain.yaml"
    path.write_text("process:\n- perplexity_filter: {lang: zh}\n")
    with pytest.raises(SteelError, match="no operator of the chain can run"):
        chain.runnable(chain.load(str(path)), None, False)
