"""Language models that answer a question, with or without an image: by a server, or by transformers."""

import base64
import io
import os
import re
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from PIL import Image
from pydantic import BaseModel, ValidationError

from mige_rt.errors import InputError
from mige_rt.validation import validation_message
from trainer.pipelines.config import OpenAIRole, TransformersRole
from trainer.pipelines.records import DroppedError
from trainer.pipelines.roles import ServiceError
from trainer.vision_models import locate_model

JPEG_QUALITY = 95
_JSON = re.compile(r"\{.*\}", re.DOTALL)  # in an answer that may have words or a code fence around it

Answer = TypeVar("Answer", bound=BaseModel)


@dataclass(frozen=True, kw_only=True)
class Question:
    """What a model is asked, at temperature 0.

    Attributes:
        text: The question.
        system: What the model is told beforehand.
        image: That the question is about.
        max_tokens: Of the answer; the paper's are short.
        schema: JSON schema of the answer; None: it is a text.
    """

    text: str
    system: str = ""
    image: Image.Image | None = None
    max_tokens: int = 100
    schema: dict[str, Any] | None = None


class ChatModel(Protocol):
    """Answers questions."""

    attempts: int

    def ask(self, question: Question) -> str:
        """The answer.

        Raises:
            DroppedError: This question cannot be answered.
            ServiceError: None can.
        """
        ...


def ask_json(chat: ChatModel, question: Question, answer: type[Answer]) -> Answer:
    """Put a question until the answer is JSON of a type, or `chat.attempts` times.

    Raises:
        DroppedError: It never was.
    """
    schema = answer.model_json_schema()
    problem = ""
    for _ in range(chat.attempts):
        hint = f"\n\nYour last answer could not be used: {problem}" if problem else ""
        text = chat.ask(
            Question(
                text=question.text + hint,
                system=question.system,
                image=question.image,
                max_tokens=question.max_tokens,
                schema=schema,
            )
        )
        match = _JSON.search(text)
        try:
            return answer.model_validate_json(match[0] if match else text, strict=True)
        except ValidationError as error:
            problem = f"{validation_message(error, 'the answer', answer)}; it was {text[:200]!r}"
    raise DroppedError("an answer that is not as asked", problem, bad=True)


def served_model(role: OpenAIRole) -> str:
    """The model that a role asks its server for. Raises InputError where neither config nor environment name it."""
    model = role.model or os.environ.get("OPENAI_MODEL")
    if not model:
        raise InputError("a role of loader openai has no model: give it in the config, or set OPENAI_MODEL")
    return model


class OpenAIChat:
    """A server with OpenAI's chat API, by OpenAI's client, which sends requests again where the server is busy."""

    def __init__(self, role: OpenAIRole) -> None:
        """Raises InputError where neither config nor environment name the model."""
        from openai import OpenAI

        self.attempts = role.attempts
        self._model, self._has_format = served_model(role), role.response_format
        self._client = OpenAI(
            base_url=role.url or os.environ.get("OPENAI_BASE_URL"),
            api_key=os.environ.get(role.key_variable) or "none",  # local servers ask for none; the client wants one
            timeout=role.timeout,
            max_retries=role.retries,
        )
        self._address = str(self._client.base_url)

    def ask(self, question: Question) -> str:
        """See `ChatModel`."""
        import openai

        messages: list[Any] = [{"role": "system", "content": question.system}] if question.system else []
        messages.append({"role": "user", "content": _content(question)})
        options: dict[str, Any] = {}
        if question.schema is not None and self._has_format:
            schema = {"name": "answer", "schema": question.schema}
            options["response_format"] = {"type": "json_schema", "json_schema": schema}
        try:
            completion: Any = self._client.chat.completions.create(
                model=self._model, messages=messages, temperature=0, max_tokens=question.max_tokens, **options
            )
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            raise DroppedError("a question that the server refuses", str(error), bad=True) from error
        except openai.APITimeoutError as error:
            raise ServiceError(
                f"the server {self._address} gave no answer in time, after {self._client.max_retries} retries; raise "
                "timeout in the config or give the server less to do, and start the same command again"
            ) from error
        except openai.OpenAIError as error:
            raise ServiceError(
                f"the server {self._address} cannot be used ({error}); check its address, model and key, and start the "
                "same command again"
            ) from error
        except ValueError:  # it is said to be JSON, and is none
            return ""
        choices = getattr(completion, "choices", None)  # what is no JSON comes as a str
        content = getattr(getattr(choices[0], "message", None), "content", None) if choices else None
        return content if isinstance(content, str) else ""


def _content(question: Question) -> Any:
    if question.image is None:
        return question.text
    file = io.BytesIO()
    question.image.save(file, "JPEG", quality=JPEG_QUALITY)
    url = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
    return [{"type": "text", "text": question.text}, {"type": "image_url", "image_url": {"url": url}}]


class TransformersChat:
    """Qwen2.5 for texts, or Qwen2-VL and Qwen2.5-VL for images, by transformers. The likeliest token is taken."""

    def __init__(self, role: TransformersRole) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        folder = locate_model(role.model)
        config: Any = AutoConfig.from_pretrained(folder, local_files_only=True)
        sees = hasattr(config, "vision_config")
        kind: Any = AutoModelForImageTextToText if sees else AutoModelForCausalLM
        dtype = torch.bfloat16 if role.precision == "bf16" else torch.float32
        self.attempts = role.attempts
        self._model = kind.from_pretrained(folder, local_files_only=True, dtype=dtype).to(role.device).eval()
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self._processor: Any = Qwen2VLImageProcessorPil.from_pretrained(folder) if sees else None
        self._image_token: int | None = config.image_token_id if sees else None
        self._name = role.model

    @torch.inference_mode()
    def ask(self, question: Question) -> str:
        """See `ChatModel`."""
        content: Any = question.text
        inputs: dict[str, Any] = {}
        if question.image is not None:
            if self._processor is None:
                raise ServiceError(f"{self._name} sees no images; name a vision-language model such as Qwen2-VL")
            content = [{"type": "image"}, {"type": "text", "text": question.text}]
            inputs = dict(self._processor([question.image], return_tensors="pt"))
        messages = [{"role": "system", "content": question.system}] if question.system else []
        messages.append({"role": "user", "content": content})
        text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        tokens = self._tokens(text, inputs)
        inputs |= {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        if self._image_token is not None:
            inputs["mm_token_type_ids"] = (tokens == self._image_token).int()
        inputs = {name: value.to(self._model.device) for name, value in inputs.items()}
        output = self._model.generate(**inputs, max_new_tokens=question.max_tokens, do_sample=False)
        return self._tokenizer.decode(output[0, tokens.shape[1] :], skip_special_tokens=True)

    def _tokens(self, text: str, image: dict[str, Any]) -> torch.Tensor:
        """int64 [1,N]; the image's one token stands as often as it has features."""
        tokens: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        if image:
            features = int(image["image_grid_thw"][0].prod()) // self._processor.merge_size**2
            tokens = [each for token in tokens for each in [token] * (features if token == self._image_token else 1)]
        return torch.tensor([tokens])
