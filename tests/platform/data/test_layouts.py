import pytest

from eagleray.platform.data.layouts import ParsedPair, RowProblem, parse_pair, readable

ASK = {"role": "user", "content": "Which river?"}
SYSTEM = {"role": "system", "content": "Be brief."}


def answer(text):
    return {"role": "assistant", "content": text}


def parse(values, **options):
    return parse_pair(values, **({"prompt": "prompt", "first": "chosen", "second": "rejected"} | options))


EXPECTED = ParsedPair([ASK], "Ucayali", "Nile")


@pytest.mark.parametrize(
    "values",
    [
        {"prompt": "Which river?", "chosen": "Ucayali", "rejected": "Nile"},
        {"prompt": [ASK], "chosen": "Ucayali", "rejected": "Nile"},
        {"prompt": "Which river?", "chosen": [answer("Ucayali")], "rejected": [answer("Nile")]},
        {"prompt": [ASK], "chosen": [answer("Ucayali")], "rejected": [answer("Nile")]},
        {"prompt": "Which river?", "chosen": [ASK, answer("Ucayali")], "rejected": [ASK, answer("Nile")]},
        {"chosen": [ASK, answer("Ucayali")], "rejected": [ASK, answer("Nile")]},
        {"prompt": None, "chosen": [ASK, answer("Ucayali")], "rejected": [ASK, answer("Nile")]},
        {
            "chosen": "\n\nHuman: Which river?\n\nAssistant: Ucayali",
            "rejected": "\n\nHuman: Which river?\n\nAssistant: Nile",
        },
        {"prompt": "\n\nHuman: Which river?\n\nAssistant:", "chosen": "Ucayali", "rejected": " Nile"},
        {
            "prompt": "\n\nHuman: Which river?\n\nAssistant:",
            "chosen": "\n\nHuman: Which river?\n\nAssistant: Ucayali",
            "rejected": "\n\nHuman: Which river?\n\nAssistant: Nile",
        },
    ],
)
def test_every_way_of_writing_the_same_pair(values):
    assert parse(values) == EXPECTED


def test_further_keys_of_messages_are_dropped():
    values = {"prompt": [ASK | {"name": "me"}], "chosen": "Ucayali", "rejected": "Nile"}
    assert parse(values) == EXPECTED


def test_answers_keep_their_blanks_in_plain_text():
    assert parse({"prompt": "The sky is", "chosen": " blue.", "rejected": " green.\n"})[1:] == (
        " blue.",
        " green.\n",
    )


def test_messages_before_the_answer_win_where_they_say_more_than_the_prompt():
    head = [SYSTEM, ASK]
    values = {"prompt": "Which river?", "chosen": [*head, answer("a")], "rejected": [*head, answer("b")]}
    assert parse(values).prompt == head


def test_hh_dialogue_of_several_turns():
    start = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Tell me: why?\n\nAssistant:"
    pair = parse({"chosen": start + " Because A.", "rejected": start + " Because\n\nB."})
    assert pair.prompt == [
        {"role": "user", "content": "Hi"},
        answer("Hello."),
        {"role": "user", "content": "Tell me: why?"},
    ]
    assert pair[1:] == ("Because A.", "Because\n\nB.")  # the common beginning of the answers stays in them


def test_marks_in_the_middle_of_a_line_are_text():
    pair = parse({"prompt": "Explain 'Human:' and Assistant: marks", "chosen": "Human: x", "rejected": "y"})
    assert pair.prompt[0]["content"] == "Explain 'Human:' and Assistant: marks"
    assert pair.first == "Human: x"


def test_transcripts_are_kept_as_text_on_demand():
    text = "\n\nHuman: Which river?\n\nAssistant:"
    pair = parse({"prompt": text, "chosen": "a", "rejected": "b"}, transcripts=False)
    assert pair.prompt == [{"role": "user", "content": text}]


def test_prompt_from_several_columns():
    columns = {"prompt": ["instruction", "input"], "first": "one", "second": "two"}
    values = {"instruction": "Add.", "input": "1 2", "one": "3", "two": "4"}
    assert parse(values, **columns).prompt[0]["content"] == "Add.\n1 2"
    assert parse(values | {"input": " "}, **columns).prompt[0]["content"] == "Add."
    del values["instruction"], values["input"]
    with pytest.raises(RowProblem, match=r"`instruction\+input` is missing"):
        parse(values, **columns)


HEAD = "\n\nHuman: Hi\n\nAssistant:"


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"prompt": "x", "rejected": "b"}, "`chosen` is missing"),
        ({"chosen": "a", "rejected": "b"}, "`prompt` is missing"),
        ({"prompt": "x", "chosen": None, "rejected": "b"}, "`chosen` is null, not text"),
        ({"prompt": "x", "chosen": "a", "rejected": 3}, "`rejected` is a number, not text"),
        ({"prompt": "x", "chosen": True, "rejected": "b"}, "`chosen` is true or false, not text"),
        (
            {"prompt": 7, "chosen": "a", "rejected": "b"},
            "`prompt` is a number, not text or a list of messages",
        ),
        ({"prompt": [], "chosen": "a", "rejected": "b"}, "`prompt` is empty"),
        ({"prompt": ["x"], "chosen": "a", "rejected": "b"}, "`prompt` holds text in place of a message"),
        (
            {"prompt": [{"role": "user", "content": None}], "chosen": "a", "rejected": "b"},
            "`prompt` holds a message without a text `role` and `content`",
        ),
        (
            {"prompt": "x", "chosen": [answer("a")], "rejected": "b"},
            "one answer is a list of messages and the other is not",
        ),
        (
            {"prompt": "x", "chosen": [ASK], "rejected": [answer("b")]},
            "the last message of `chosen` is not the assistant's",
        ),
        ({"prompt": "x", "chosen": [], "rejected": [answer("b")]}, "`chosen` is empty"),
        (
            {"chosen": [ASK, answer("a")], "rejected": [SYSTEM, answer("b")]},
            "the conversations differ before the last message",
        ),
        ({"chosen": [answer("a")], "rejected": [answer("b")]}, "`prompt` is missing"),
        (
            {"prompt": "other", "chosen": [ASK, answer("a")], "rejected": [ASK, answer("b")]},
            "the messages before the answer do not agree with `prompt`",
        ),
        (
            {"chosen": HEAD + " a", "rejected": "\n\nHuman: Ho\n\nAssistant: b"},
            "`chosen` and `rejected` do not begin with the same hh-rlhf turns",
        ),
        (
            {
                "chosen": HEAD + " a\n\nHuman: x\n\nAssistant: c",
                "rejected": HEAD + " b\n\nHuman: x\n\nAssistant: d",
            },
            "the dialogues differ before the last turn",
        ),
    ],
)
def test_rows_that_do_not_fit(values, reason):
    with pytest.raises(RowProblem) as problem:
        parse(values)
    assert problem.value.reason == reason


def test_a_missing_field_lists_those_there_are():
    with pytest.raises(
        RowProblem, match="the row has prompt, better, worse; set `columns` if it goes by another"
    ):
        parse({"prompt": "x", "better": "a", "worse": "b"})


def test_forced_transcripts_need_their_marks():
    values = {"prompt": "What?", "chosen": "a", "rejected": "b"}
    with pytest.raises(RowProblem, match="`prompt` is not in hh-rlhf turns"):
        parse(values, transcripts=True)


def test_readable_names_the_roles_unless_one_user_speaks():
    assert readable([ASK]) == "Which river?"
    assert (
        readable([ASK, answer("Peru?"), ASK])
        == "User: Which river?\n\nAssistant: Peru?\n\nUser: Which river?"
    )
    assert readable([SYSTEM]) == "System: Be brief."
