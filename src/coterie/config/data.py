"""Where the text is and how it becomes sequences."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from coterie.config.base import LocalPath, Spec


class TokenizerTraining(Spec):
    """A byte-level BPE tokenizer made for this run. Its vocabulary repeats its files, so they must be public."""

    files: tuple[LocalPath, ...] = Field(
        min_length=1, description="Public text files to learn the vocabulary from (jsonl, txt, csv, parquet)."
    )
    vocab_size: int = Field(default=4096, ge=260, description="Number of tokens, 256 bytes and end of text included.")


class TokenizerSpec(Spec):
    """Where the tokenizer comes from. Empty (or the word `model`): the one beside the model."""

    path: LocalPath | None = Field(default=None, description="Folder with a tokenizer, or a tokenizer.json.")
    train: TokenizerTraining | None = Field(default=None, description="Make one from public text.")
    provenance: str | None = Field(
        default=None,
        pattern=r"^(public|private|dp:\S+)$",
        description="What the vocabulary was made from, as for the model; private training asks for it with `path`.",
    )
    not_covered: str | None = Field(
        default=None,
        min_length=1,
        description="With `provenance: private`: whose records the vocabulary was made from, as for the model.",
    )

    @model_validator(mode="after")
    def _at_most_one(self) -> TokenizerSpec:
        if self.path is not None and self.train is not None:
            raise ValueError("name `path` or `train`, not both")
        return self


class LabelWordsSpec(Spec):
    """How classes are asked of the language-model head."""

    column: str = Field(default="label", description="Column that holds the class.")
    prompt: str = Field(
        description="How a text is written, with `{text}`, and `{word}` where the class's word stands: at the end "
        "for causal models, anywhere for masked ones.",
    )
    words: dict[str, str] = Field(
        min_length=2, description="The word of every class, a single token each, with the space before it if any."
    )

    @field_validator("words", mode="before")
    @classmethod
    def _classes_as_text(cls, value: Any) -> Any:
        return {_class_text(name): word for name, word in value.items()} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _can_be_written(self) -> LabelWordsSpec:
        for place in ("{text}", "{word}"):
            if self.prompt.count(place) != 1:
                raise ValueError(f"`prompt` needs {place} once, it has it {self.prompt.count(place)} times")
        if len(set(self.words.values())) < len(self.words):
            raise ValueError("two classes have the same word: nothing would tell them apart")
        return self

    def class_of(self, value: Any) -> str | None:
        """The class that a value of the column names; None if it is none."""
        name = _class_text(value)
        return name if name in self.words else None


def _class_text(value: Any) -> str:
    """A class's name as text: YAML and JSON may hold numbers and truth values."""
    return str(value).lower() if isinstance(value, bool) else str(value)


class DataSpec(Spec):
    """Text to train and test on. Format by file suffix: .jsonl/.json, .txt, .csv/.tsv, .parquet.

    Files are UTF-8 and their names literal. Only the named columns are read, and their values stay as written. A line
    of a txt file ends at LF or CR LF.
    """

    later_keys = frozenset({"form", "template", "task", "label_words"})

    train: tuple[LocalPath, ...] = Field(
        min_length=1, description="Files to train on; also a folder that `datasets` saved to disk."
    )
    test: tuple[LocalPath, ...] = Field(default=(), description="Held-out files; without them nothing is evaluated.")
    format: Literal["jsonl", "txt", "csv", "parquet"] | None = Field(
        default=None, description="Format of all files, when the suffix does not tell."
    )
    text: str = Field(default="text", description="Column that holds the text (not for txt files).")
    form: Literal["text", "messages", "prompt_completion", "instruction"] = Field(
        default="text",
        description="What a row is: text; or a conversation by columns `messages`, `prompt` and `completion`, or "
        "`instruction`, `input` and `output`, written by the tokenizer's chat template; answers alone are trained.",
    )
    task: Literal["text", "label_words"] = Field(
        default="text",
        description="`text`: every token is predicted. `label_words`: only the word of each text's class, among the "
        "words of all classes; see `label_words`.",
    )
    label_words: LabelWordsSpec | None = Field(default=None, description="For `task: label_words`.")
    template: LocalPath | None = Field(
        default=None, description="File with a chat template (Jinja), in place of the tokenizer's."
    )
    split_text: Literal["file", "paragraph", "line"] = Field(
        default="file",
        description="What one document is in a txt file; lines end at LF or CR LF, paragraphs at an empty line.",
    )
    sequence_length: int = Field(default=512, ge=2, description="Most tokens in one sequence.")
    packing: Literal["chunks", "records", "documents"] = Field(
        default="chunks",
        description="`chunks`: a document is cut into sequences, none holds text of two. `records`: one sequence per "
        "document, the rest is cut off. `documents`: several documents share a sequence and see each other.",
    )
    provenance: Literal["private", "public"] = Field(
        default="private",
        description="Whether the text to train on needs protection. A model that was trained without privacy on text "
        "that is not `public` says so, and private training does not start from it.",
    )
    tokenizer: TokenizerSpec = Field(
        default=TokenizerSpec(), description="`model`, a path, or a block with `path` or `train`."
    )

    @field_validator("tokenizer", mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {} if value == "model" else {"path": value}
        return value

    @field_validator("train", "test", mode="before")
    @classmethod
    def _one_file(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _a_text_has_one_class(self) -> DataSpec:
        if (self.task == "label_words") != (self.label_words is not None):
            raise ValueError("`task: label_words` and the block `label_words` belong together: set both or neither")
        if self.label_words is not None:
            if self.form != "text":
                raise ValueError("`task: label_words` writes texts by its own prompt: leave out `form`")
            if "packing" not in self.model_fields_set:
                object.__setattr__(self, "packing", "records")
            elif self.packing != "records":
                raise ValueError("with `task: label_words` a text is a record: use `packing: records`")
        return self

    @model_validator(mode="after")
    def _a_conversation_is_a_record(self) -> DataSpec:
        if self.form != "text":
            if "packing" not in self.model_fields_set:
                object.__setattr__(self, "packing", "records")
            elif self.packing != "records":
                raise ValueError(f"with `form: {self.form}` a conversation is a record: use `packing: records`")
        elif self.template is not None:
            raise ValueError("`template` writes conversations: set `form` to what a row is")
        return self
