"""The loop of `lm generate`: what is kept, left out, saved and set."""

import json

import pytest

import lmcli
from lmcli.checkpoints import folder
from lmcli.config import GenerateConfig
from lmcli.data.schema import row_prompt
from lmcli.errors import UserError
from lmcli.generation.chat import Chat, without_answer
from lmcli.generation.conversation import Session
from lmcli.generation.prompts import slid_note
from lmcli.text.chat_template import DEFAULT_TEMPLATE
from lmcli.text.tokenizer import Tokenizer

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}


@pytest.fixture(scope="module")
def model(small_model, small_tokenizer, tmp_path_factory):
    """A random model of context 128 with a chat template, loaded from its folder."""
    path = tmp_path_factory.mktemp("chat")
    settings = {**small_tokenizer.settings, "chat_template": DEFAULT_TEMPLATE}
    built = small_model(max_position_embeddings=128, vocab_size=small_tokenizer.size)
    folder.save(path, built, Tokenizer(small_tokenizer.core, settings), GenerateConfig())
    return lmcli.load(path)


@pytest.fixture
def session(model):
    """session(chat): a Session that generates 8 tokens, and what it notes."""

    def build(chat=True, **options):
        notes: list[str] = []
        options = {"max_new_tokens": 8, "temperature": 0.0, **options}
        built = Session(model, model.chat() if chat else None, options, (), None, 3, notes.append)
        return built, notes

    return build


class TestSession:
    def test_answers_are_those_of_the_whole_conversation(self, session, model):
        talk, _ = session()
        first = "".join(talk.answer("Hi"))
        second = "".join(talk.answer("And?"))
        messages = [USER, {**ANSWER, "content": first}, {**USER, "content": "And?"}]
        ids = model.chat().encode(messages).ids
        decoder = model.decoder(max_new_tokens=8, temperature=0.0)
        assert decoder.generate([ids], [0])[0].text == second
        assert [message["content"] for message in talk.messages][1::2] == [first, second]

    def test_without_a_template_each_prompt_is_continued(self, session, model):
        talk, _ = session(chat=False)
        options = {"max_new_tokens": 8, "temperature": 0.0}
        for prompt in ("The baker", "A"):
            assert "".join(talk.answer(prompt)) == model.generate(prompt, **options)[0].text

    def test_a_text_that_outgrows_the_context_says_so_once(self, session, model):
        talk, notes = session(chat=False, max_new_tokens=140)
        for _ in range(2):
            list(talk.answer("The baker"))
        assert notes == [slid_note(1, 128)]
        with pytest.raises(UserError, match="more than the context of 128"):
            list(talk.answer("word " * 200))

    def test_the_oldest_turns_are_left_out_and_it_is_said_once(self, session, model):
        talk, notes = session()
        for number in range(12):
            list(talk.answer(f"Message {number}"))
        assert len(notes) == 1 and "context of 128 tokens" in notes[0]
        assert len(talk.messages) == 24 and talk.first > 0 and talk.first % 2 == 0
        ids, limit = talk._fitted(8, "?")
        assert len(ids) + limit <= 128
        talk.reset()
        assert (talk.messages, talk.first) == ([], 0)

    def test_a_message_longer_than_the_context_is_refused_and_not_kept(self, session):
        talk, _ = session()
        with pytest.raises(UserError, match=r"the message is \d+ tokens longer than the context"):
            list(talk.answer("word " * 200))
        assert talk.messages == []

    def test_what_was_stopped_is_kept(self, session):
        talk, _ = session(max_new_tokens=100)
        answer = talk.answer("Hi")
        begun = next(answer) + next(answer)
        answer.close()
        assert talk.messages == [USER, {"role": "assistant", "content": begun}]

    def test_beams_give_one_piece(self, session):
        assert len(list(session(num_beams=2)[0].answer("Hi"))) == 1

    def test_saved_conversations_are_rows_that_are_read_again(self, session, tmp_path):
        talk, _ = session()
        with pytest.raises(UserError, match="nothing was said"):
            talk.run("/save x")
        talk.set("system", "Be kind.")
        list(talk.answer("Hi"))
        for _ in range(2):
            assert (
                talk.run(f"/save {tmp_path}/a b.jsonl") == f"1 line added to {tmp_path}/a b.jsonl"
            )
        rows = [json.loads(line) for line in (tmp_path / "a b.jsonl").read_text().splitlines()]
        roles = [message["role"] for message in row_prompt(rows[1])]
        assert rows[0] == rows[1] and roles == ["system", "user", "assistant"]
        plain, _ = session(chat=False)
        list(plain.answer("A"))
        list(plain.answer("B"))
        assert plain.run(f"/save {tmp_path}/b") == f"2 lines added to {tmp_path}/b"
        row = json.loads((tmp_path / "b").read_text().splitlines()[1])
        assert row["prompt"] == "B" and set(row) == {"prompt", "completion"}
        with pytest.raises(UserError, match="cannot write"):
            talk.run(f"/save {tmp_path}")

    def test_options_are_set(self, session):
        talk, _ = session(temperature=None)
        assert talk.run("/set temperature 0.5") == "temperature 0.5"
        assert talk.decoder().config.temperature == 0.5
        assert talk.run("/set max-new-tokens=3") == "max_new_tokens 3"
        assert talk.run("/set temperature") == "temperature 0.8"  # the default of the folder
        assert talk.run("/set seed 9") == "seed 9" and talk.seed == 9
        assert talk.run("/set") == "max_new_tokens 3, temperature 0.8, seed 9, system none"

    @pytest.mark.parametrize(
        "line, message",
        [
            ("/set temperature hot", "temperature: 'hot' is not a number"),
            ("/set temperature -1", "temperature"),
            ("/set heat 1", "heat is no option"),
            ("/set seed x", "seed: 'x' is no whole number"),
            ("/save", "needs the name of a file"),
            ("/what", "/what is no command"),
            ("/reset all", "/reset is no command"),
        ],
    )
    def test_mistakes_change_nothing(self, session, line, message):
        talk, _ = session()
        list(talk.answer("Hi"))
        before = (dict(talk.options), talk.seed, list(talk.messages))
        with pytest.raises(UserError, match=message):
            talk.run(line)
        assert before == (talk.options, talk.seed, talk.messages)


class TestChat:
    def test_ids_are_those_of_transformers(self, model, small_tokenizer):
        from transformers import AutoTokenizer

        theirs = AutoTokenizer.from_pretrained(model.folder)
        for messages in ([USER], [USER, ANSWER, USER]):
            expected = theirs.apply_chat_template(messages, add_generation_prompt=True)
            assert model.chat().encode(messages).ids == expected["input_ids"]

    def test_a_system_message_comes_first_unless_there_is_one(self, model):
        system = {"role": "system", "content": "A"}
        chat = model.chat("A")
        assert chat.encode([USER]) == model.chat().encode([system, USER])
        assert chat.encode([{**system, "content": "B"}, USER]).text.count("<|system|>") == 1
        assert model.chat("").encode([USER]).text.startswith("<|endoftext|><|system|>\n\n<|user|>")

    def test_the_last_answer_of_a_row_is_its_target(self):
        assert without_answer([USER, ANSWER]) == [USER] == without_answer([USER])
        begun = [USER, {**ANSWER, "prefix": True}]
        assert without_answer(begun) == begun

    def test_a_model_without_a_template_is_named(self, small_tokenizer):
        with pytest.raises(UserError, match="runs/a: has no chat template"):
            Chat(small_tokenizer, "runs/a")


@pytest.mark.parametrize(
    "row, fields, expected",
    [
        ("a line", (), "a line"),
        ({"text": "a"}, (), "a"),
        ({"prompt": "a", "completion": "b"}, (), "a"),
        ({"source": "a", "target": "b"}, (), "a"),
        ({"instruction": "a", "input": "", "output": "c"}, (), "a"),
        ({"instruction": "a", "input": "b", "output": "c"}, (), "a\nb"),
        ({"question": "a", "context": "b"}, (), "question: a context: b"),
        ({"messages": [USER], "text": "a"}, (), [USER]),
        ({"chat": [USER], "text": "a"}, ("chat",), [USER]),
        ({"a": "x", "b": "y"}, ("a", "b"), "xy"),
    ],
)
def test_the_prompt_of_a_row(row, fields, expected):
    assert row_prompt(row, fields) == expected


@pytest.mark.parametrize("value", [None, "text", [], [1], [{"content": "x"}], {"role": "user"}])
def test_what_is_no_list_of_messages_is_refused(value):
    with pytest.raises(ValueError, match="'messages' is no list of messages"):
        row_prompt({"messages": value})
