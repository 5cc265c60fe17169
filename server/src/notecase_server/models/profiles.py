"""Describes as data the form of a conversation that each server accepts. The defaults are what the strictest of the
common servers accept, if no other server loses by it. A row says where a server or a family of models differs, and who
reported it. Nothing here was tested with the services themselves.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import msgspec

_CACHED = 256
"""Models whose profile is kept; agents name a handful."""


class Profile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The shape of a request. Every member can be overridden by an operator."""

    auth: Literal["bearer", "api-key"] = "bearer"
    """The header that carries the key: `Authorization`, or `api-key`."""
    system: Literal["first", "each"] = "first"
    """Whether all system messages are joined into one at the beginning, or each stays where it was said."""
    system_role: Literal["system", "developer", "user"] = "system"
    """The role of a system message. With "user" the one at the beginning is joined to the user's first message."""
    neighbours: Literal["joined", "apart"] = "joined"
    """What becomes of neighbouring messages of one role."""
    text: Literal["string", "list"] = "string"
    """How a user's message of several texts is sent."""
    empty_content: Literal["null", "empty", "absent"] = "null"
    """The `content` of an assistant's message that only calls tools."""
    empty_result: str = "(no output)"
    """The text in place of a tool's empty result."""
    after_tool: Literal["assistant", "user"] = "assistant"
    """What may follow a tool's message. With "assistant" a short one is put before a user's."""
    first: Literal["user", "any"] = "user"
    """With "user" a conversation that would begin with a reply begins with a request to do so."""
    last: Literal["user", "any"] = "user"
    """With "user" a request that would end with a reply, or without any message, ends with a request to go on."""
    refusal: Literal["text", "member"] = "text"
    """Whether an assistant's refusal is sent as its content, or as a separate member."""
    call_ids: Literal["own", "nine"] = "own"
    """Which of its own call ids the provider gets back: each, or only those of 9 letters and digits."""
    calls: Literal["many", "one"] = "many"
    """How many calls one assistant's message may hold. With "one" parallel calls are also declined."""
    called_tools: Literal["omitted", "declared"] = "omitted"
    """Whether a request without tools declares those that its history calls."""
    reasoning: Literal["none", "turn", "always"] = "turn"
    """How long the provider gets its model's reasoning back: not at all, until the user speaks again, or always."""
    made_images: Literal["words", "user"] = "words"
    """What becomes of the images of a reply: each is named there, or those of the newest reply that has any are shown
    in a user's message behind it, which is the only place where servers take images."""
    unsigned_call: dict[str, Any] = {}
    """Members of a call that has no provider data: it was made elsewhere, or cut."""
    unsigned_reply: dict[str, Any] = {}
    """Members of an assistant's message that goes without reasoning of this provider."""
    limit_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """Where `max_output_tokens` is put."""
    stream: bool = True
    """Whether a reply is requested piece by piece. Otherwise it comes whole, and the usage with it."""
    stream_options: bool = True
    """Whether the usage is requested."""
    schemas: Literal["open", "strict"] = "open"
    """With "strict" tools and replies are declared `strict`, their objects closed and all properties required."""
    schema_without: tuple[str, ...] = ()
    """Keywords that are left out of schemas."""
    descriptions: Literal["whole", "cut"] = "whole"
    """Whether a tool's description is cut after 1024 characters."""
    combined: Literal["kept", "merged"] = "kept"
    """What becomes of `anyOf`, `oneOf`, `allOf` and a reference at the top of a tool's parameters. With "merged" the
    object has the properties of all of them."""
    output: Literal["json_schema", "json_object", "words"] = "json_schema"
    """How a reply by a schema is requested. All but "json_schema" put the schema into the system message."""
    output_with_tools: Literal["same", "words"] = "same"
    """How it is requested if tools are declared."""
    think_tags: bool = False
    """Whether a reply may begin with reasoning in tags, such as <think>, which is then separated from its text."""


class Row(NamedTuple):
    """Where a server differs. `host` and `model` are patterns of the whole name, in lower case; a row applies where all
    that it has match, and one that has neither is chosen by its name only."""

    name: str
    sets: Mapping[str, Any]
    source: str
    host: str = ""
    model: str = ""

    def applies(self, host: str, model: str) -> bool:
        if not (self.host or self.model):
            return False
        fits = re.fullmatch(self.host, host) if self.host else True
        return bool(fits and (re.fullmatch(self.model, model) if self.model else True))


_AZURE_OPENAI = r".+\.(openai|cognitiveservices)\.azure\.(com|us|cn)"
_AZURE = rf"{_AZURE_OPENAI}|.+\.services\.ai\.azure\.(com|us|cn)"
_MISTRAL = r"(api|codestral)\.mistral\.ai"
_PRIVATE = r"(127|10)(\.\d+){3}|192\.168(\.\d+){2}|172\.(1[6-9]|2\d|3[01])(\.\d+){2}"
_OWN = rf"[^.]+|{_PRIVATE}|.+\.(local|localdomain|lan|internal)"
"""Hosts of the local network: names without a dot, IPv6 addresses and private ones."""
_GEMINI = r"(generativelanguage|.*aiplatform)\.googleapis\.com"

ROWS: Sequence[Row] = (
    Row(
        "openai",
        {"limit_field": "max_completion_tokens"},
        "platform.openai.com/docs/api-reference/chat/create: max_tokens is not compatible with o-series models",
        host=r".+\.openai\.com",
    ),
    Row(
        "openai",
        {"system": "each", "after_tool": "user", "first": "any", "refusal": "member"},
        "platform.openai.com/docs/api-reference/chat/create: messages of any role in any order, `refusal`",
        host=r".+\.openai\.com",
    ),
    Row(
        "openai",
        {"combined": "merged"},
        "makenotion/notion-mcp-server#340: schema must not have 'oneOf'/'anyOf'/'allOf'/'enum'/'not' at the top level",
        host=r".+\.openai\.com",
    ),
    Row(
        "openai",
        {"limit_field": "max_completion_tokens"},
        "RooCodeInc/Roo-Code#6979, BerriAI/litellm#13432: GPT-5 and the o-series through gateways",
        model=r"(.*[/:.])?(gpt-[5-9]|o[1-9])\b.*",
    ),
    Row(
        "azure",
        {"limit_field": "max_completion_tokens"},
        "mindsdb/mindshub#11285",
        host=_AZURE,
    ),
    Row(
        "azure",
        {"auth": "api-key"},
        "mindsdb/mindshub#11285, i-am-bee/agentstack#1316, SecureAI-Tools/SecureAI-Tools#94",
        host=_AZURE,
    ),
    Row(
        "azure",
        {"system": "each", "after_tool": "user", "first": "any", "refusal": "member"},
        "learn.microsoft.com/azure/ai-services/openai/reference: as OpenAI's own",
        host=_AZURE_OPENAI,
    ),
    Row(
        "mistral",
        {"stream_options": False},
        "dnakov/anon-kode#53: stream_options.include_usage is an extra input; the usage comes without",
        host=_MISTRAL,
    ),
    Row("mistral", {"reasoning": "none"}, "charmbracelet/crush#1590, BerriAI/litellm#30835", host=_MISTRAL),
    Row("mistral", {"call_ids": "nine"}, "langchain-ai/langchain#24668, openclaw/openclaw#23595", host=_MISTRAL),
    Row(
        "mistral",
        {"call_ids": "nine"},
        "jackmpcollins/magentic#276, ml-explore/mlx-lm#1375: mistral-common checks it on every server",
        model=r"(.*[/:])?(mistral|mixtral|ministral|magistral|devstral|codestral|pixtral)\b.*",
    ),
    Row(
        "deepseek",
        {"reasoning": "always"},
        "api-docs.deepseek.com/guides/thinking_mode, charmbracelet/crush#2754, FellouAI/eko#281",
        host=r"api\.deepseek\.com",
    ),
    Row(
        "deepseek",
        {"unsigned_reply": {"reasoning_content": " "}},
        "openclaw/openclaw#73417, NousResearch/hermes-agent#17341: in each reply of the history, and not empty",
        host=r"api\.deepseek\.com",
    ),
    Row(
        "deepseek",
        {"output": "json_object"},
        "UKGovernmentBEIS/inspect_ai#4916, llm-exe/llm-exe#662",
        host=r"api\.deepseek\.com",
    ),
    Row(
        "deepseek",
        {"reasoning": "always", "unsigned_reply": {"reasoning_content": " "}},
        "charmbracelet/crush#2754, earendil-works/pi#3640: the same through a gateway",
        model=r"(.*[/:])?deepseek-v4\b.*",
    ),
    Row(
        "moonshot",
        {"reasoning": "always"},
        "continuedev/continue#11600, can1357/oh-my-pi#1839",
        host=r"api\.moonshot\.(ai|cn)",
    ),
    Row(
        "moonshot",
        {"reasoning": "always"},
        "can1357/oh-my-pi#1839: reasoning across calls, wherever the model is served",
        model=r"(.*[/:])?kimi-k\d.*",
    ),
    Row(
        "openrouter",
        {"reasoning": "always"},
        "openrouter.ai/docs/use-cases/reasoning-tokens: reasoning_details are passed back unmodified",
        host=r"openrouter\.ai",
    ),
    Row(
        "gemini",
        {"unsigned_call": {"extra_content": {"google": {"thought_signature": "skip_thought_signature_validator"}}}},
        "ai.google.dev/gemini-api/docs/thought-signatures, jeremychone/rust-genai#115, pydantic/pydantic-ai#3881",
        host=_GEMINI,
    ),
    Row(
        "gemini",
        {"output_with_tools": "words"},
        "googleapis/python-genai#867, openai/openai-agents-python#656",
        host=_GEMINI,
    ),
    Row(
        "gemini",
        {"schema_without": ("$schema", "additionalProperties", "propertyNames", "examples")},
        "QwenLM/qwen-code#1186, felinics/Memoh#620, openswarm-ai/openswarm#24, AstrBotDevs/AstrBot#7572",
        host=_GEMINI,
    ),
    Row("groq", {"reasoning": "none"}, "janhq/jan#8136, karthink/gptel#774", host=r"api\.groq\.com"),
    Row("groq", {"output_with_tools": "words"}, "vercel/ai#16540, agno-agi/agno#1065", host=r"api\.groq\.com"),
    Row("cerebras", {"reasoning": "none"}, "Kilo-Org/kilocode#10375", host=r"api\.cerebras\.ai"),
    Row(
        "image-models",
        {"made_images": "user"},
        "danny-avila/LibreChat#11591, suurt8ll/open_webui_functions#15: they go on from the image that they made; "
        "OpenHands/OpenHands#7700: images are taken from users only",
        model=r".*\bimage\b.*",
    ),
    Row(
        "local",
        {"think_tags": True},
        "langchain-ai/langchain#32120, zed-industries/zed#58042, ggml-org/llama.cpp#25292: servers of one's own that "
        "run without a parser for the reasoning of their model",
        host=_OWN,
    ),
    Row(
        "deepseek",
        {"think_tags": True},
        "vllm-project/vllm#14170, andrewyng/openworker#111: R1 wherever it is served without a parser",
        model=r"(.*[/:])?deepseek-r1\b.*",
    ),
    Row(
        "gemini",
        {"think_tags": True},
        "ai.google.dev/gemini-api/docs/openai: include_thoughts puts them into the content, in <thought>",
        host=_GEMINI,
    ),
    Row(
        "minimax",
        {"think_tags": True},
        "can1357/oh-my-pi#1205: both of its endpoints",
        host=r"api\.minimaxi?\.(io|com|chat)",
    ),
    Row(
        "minimax",
        {"think_tags": True},
        "RooCodeInc/Roo-Code#8989, QwenLM/qwen-code#3228, decolua/9router#2231: wherever it is served",
        model=r"(.*[/:])?minimax-m\d.*",
    ),
    Row(
        "qwen",
        {"think_tags": True},
        "QwenLM/qwen-code#6751, OpenWhispr/openwhispr#178, Cerebras/cerebras-cloud-sdk-python#10",
        model=r"(.*[/:])?(qwen-?3|qwq)\b.*",
    ),
    Row(
        "glm",
        {"think_tags": True},
        "zai-org/GLM-4#772, zai-org/GLM-V#138: on servers without a parser",
        model=r"(.*[/:])?glm-(z1|4\.\d).*",
    ),
    Row(
        "mistral",
        {"think_tags": True},
        "LostRuins/koboldcpp#1745, ollama/ollama#11064: Magistral writes [THINK] or <think>",
        model=r"(.*[/:])?magistral\b.*",
    ),
    Row(
        "moonshot",
        {"think_tags": True},
        "huggingface.co/moonshotai/Kimi-VL-A3B-Thinking-2506, Blaizzy/mlx-vlm#299: ◁think▷",
        model=r"(.*[/:])?kimi-vl\b.*",
    ),
    Row(
        "seed-oss",
        {"think_tags": True},
        "vllm-project/vllm#23241, open-webui/open-webui#16856, anomalyco/opencode#3703: <seed:think>",
        model=r"(.*[/:])?seed-oss\b.*",
    ),
    Row(
        "apertus",
        {"think_tags": True},
        "vllm-project/vllm#50496, sgl-project/sglang#31383: <|inner_prefix|>",
        model=r"(.*[/:])?apertus\b.*",
    ),
    Row(
        "gpt-oss",
        {"think_tags": True},
        "ml-explore/mlx-lm#1867, kekzl/imp#768, NVIDIA/TensorRT-LLM#9256: on servers that do not know its channels",
        model=r"(.*[/:])?gpt-oss\b.*",
    ),
    Row(
        "reka",
        {"think_tags": True},
        "huggingface.co/RekaAI/reka-flash-3: <reasoning>",
        model=r"(.*[/:])?reka-flash-3\b.*",
    ),
    Row(
        "perplexity",
        {"think_tags": True},
        "docs.perplexity.ai/guides/structured-outputs: sonar-reasoning-pro thinks in <think>, and JSON comes behind it",
        model=r"(.*[/:])?sonar-(reasoning|deep-research)\b.*",
    ),
    Row("lmstudio", {"empty_content": "empty"}, "lmstudio-ai/lmstudio-bug-tracker#261"),
    Row("mlx", {"empty_content": "empty"}, "cubist38/mlx-openai-server#205, mistralai/mistral-common#324"),
    Row(
        "llama-template",
        {"calls": "one"},
        "vllm-project/vllm#12938: the template takes single tool calls only",
    ),
)


class Refused(NamedTuple):
    """What a server says that refuses the form of a request, and the form that it takes."""

    words: re.Pattern[str]
    sets: Mapping[str, Any]
    source: str
    of: Mapping[str, Any] = MappingProxyType({})
    """What the refused form has, if the words could mean either way."""


REFUSED: Sequence[Refused] = (
    Refused(
        re.compile(
            r"(?is)\A(?!.*\binvalid\b.{0,30}\bschema)"
            r".*(response_format|response format|response mime type|json_schema|\bjson mode|structured output"
            r"|guided decoding)"
        ),
        {"output": "words"},
        "diegosouzapw/OmniRoute#9992, caura-ai/caura#1475: This response_format type is unavailable now",
    ),
    Refused(
        re.compile(r"stream_options|include_usage"),
        {"stream_options": False},
        "FlowiseAI/Flowise#2866, openai/openai-python#2296: Extra inputs are not permitted, field: 'stream_options'",
    ),
    Refused(
        re.compile(
            r"(?is)verified to stream|cannot use tools with stream"
            r"|\bstream(ing)?\b(?! ?options)[^.]{0,40}\b(not (be )?(support(ed)?|allowed|enabled)|unsupported)\b"
            r"|(\bnot |n't |\bun)support(ed)?\b[^.]{0,60}\bstream(ing)?\b(?! ?options)"
        ),
        {"stream": False},
        "RooCodeInc/Roo-Code#6868, earendil-works/pi#3739, OpenAgentPlatform/Dive#90: OpenAI for accounts that are not "
        "verified, Llama on Bedrock and older llama.cpp with tools",
    ),
    Refused(
        re.compile(r"max_completion_tokens"),
        {"limit_field": "max_completion_tokens"},
        "RooCodeInc/Roo-Code#6979, BerriAI/litellm#13432: Use 'max_completion_tokens' instead",
        of={"limit_field": "max_tokens"},
    ),
    Refused(
        re.compile(
            r"(?i)\b(unrecogni[sz]ed|unknown|unexpected|unsupported|extra)\b[^.]{0,60}\bmax_tokens\b"
            r"|\bmax_tokens\b[^.]{0,20}\bextra inputs"
        ),
        {"limit_field": "max_completion_tokens"},
        "Azure's gateways: Unsupported parameter(s): max_tokens",
        of={"limit_field": "max_tokens"},
    ),
    Refused(
        re.compile(
            r"(?is)\A(?=.*max_completion_tokens).*(unrecogni[sz]ed|unknown|unexpected|unsupported|\bextra\b"
            r"|not (supported|permitted|allowed|defined)|\buse\b.{0,3}max_tokens)"
        ),
        {"limit_field": "max_tokens"},
        "servers that do not know it yet, asked for GPT-5 and the like: Unrecognized request argument supplied",
        of={"limit_field": "max_completion_tokens"},
    ),
    Refused(
        re.compile(
            r"(?i)\bsystem['\"]? (role|messages?|prompts?)\b[^.!?]{0,40}\bnot (be )?(supported|allowed|enabled)"
            r"|\b(unexpected|invalid|unknown|unsupported) role:? ['\"]?system\b"
            r"|\brole:? ['\"]?system\b[^.!?]{0,30}\bnot\b|not support ['\"]?system\b"
            r"|developer instructions? (is|are) not enabled|only user and assistant roles|roles must alternate"
        ),
        {"system_role": "user"},
        "huggingface/chat-ui#1386, sgl-project/sglang#892, vllm-project/vllm#2080: templates of Gemma 2 and Mistral 7B",
    ),
    Refused(
        re.compile(
            r"(?is)\bcontent\b[^.]{0,60}(\bstring or\b|<nil>|\bnull\b|\bnone\b|\brequired\b)"
            r"|\bcontent\b.{0,60}\bvalid string\b.{0,200}\bvalid list\b"
            r"|(required|missing)\b[^.]{0,30}\bcontent\b|\bNullValue\b|\bNoneType\b"
        ),
        {"empty_content": "empty"},
        "lmstudio-ai/lmstudio-bug-tracker#261 and #812, SAIL-Research-Lab/cheetahclaws#72: LM Studio, Ollama",
        of={"empty_content": "null"},
    ),
    Refused(
        re.compile(r"(?is)\bdescription\b.{0,40}\btoo long\b"),
        {"descriptions": "cut"},
        "getsentry/sentry-mcp#106, langchain-ai/open_deep_research#80, danny-avila/LibreChat#5741: OpenAI, Azure",
    ),
    Refused(
        re.compile(r"(?is)\b(any|one|all)Of\b.{0,80}\btop.?level\b|\btop.?level\b.{0,80}\b(any|one|all)Of\b"),
        {"combined": "merged"},
        "makenotion/notion-mcp-server#340, zereight/gitlab-mcp#550, hope1026/weppy-roblox-mcp#77: Anthropic, OpenAI",
    ),
    Refused(
        re.compile(
            r"(?i)without `?tools=|toolConfig\b.{0,40}\bmust be defined|\btool_(use|result)\b.{0,60}\bdefine tools"
        ),
        {"called_tools": "declared"},
        "anomalyco/opencode#8246, earendil-works/pi#149, langgenius/dify#17545: LiteLLM, Bedrock behind gateways",
    ),
)


def after(refusal: str, profile: Profile) -> Profile:
    """Returns the profile for a server that refused a request of this one with these words."""
    changes: dict[str, Any] = {}
    for row in REFUSED:
        if row.words.search(refusal) and all(getattr(profile, name) == value for name, value in row.of.items()):
            changes |= row.sets
    return msgspec.structs.replace(profile, **changes)


NAMES = tuple(sorted({"default", *(row.name for row in ROWS)}))


class Profiles:
    """The profiles of one endpoint, by model."""

    def __init__(self, host: str, chosen: Mapping[str, Any] = MappingProxyType({}), rows: Sequence[Row] = ROWS) -> None:
        """`chosen` is what `read` made of an operator's choice."""
        overrides = dict(chosen)
        self._name = overrides.pop("profile", "")
        self._overrides = overrides
        self._host = host.lower()
        self._rows = rows
        self._made: dict[str, Profile] = {}

    def of(self, model: str) -> Profile:
        """Returns the profile of that model."""
        made = self._made.get(model)
        if made is None:
            if len(self._made) >= _CACHED:
                self._made.clear()
            made = self._made[model] = self._make(model.lower())
        return made

    def _make(self, model: str) -> Profile:
        sets: dict[str, Any] = {}
        for row in self._rows:
            if row.name == self._name if self._name else row.applies(self._host, model):
                sets |= row.sets
        return msgspec.convert(sets | self._overrides, Profile)


def read(choice: str) -> dict[str, Any]:
    """Reads an operator's choice: the name of a built-in profile, a JSON object of members to override (`profile` in it
    names a built-in one), or the path of a file with such an object. Empty means no choice. Raises ValueError with a
    sentence about the mistake."""
    if not choice:
        return {}
    if choice in NAMES:
        return {"profile": choice}
    text = choice
    if not choice.lstrip().startswith("{"):
        try:
            text = Path(choice).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeError, ValueError):
            known = ", ".join(NAMES)
            raise ValueError(f"{choice[:80]!r} is not a profile ({known}), a JSON object or a file") from None
    try:
        members = msgspec.json.decode(text, type=dict[str, Any])
        name = members.get("profile", "")
        msgspec.convert({key: value for key, value in members.items() if key != "profile"}, Profile)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ValueError(f"the profile cannot be used: {error}") from None
    if name and name not in NAMES:
        raise ValueError(
            f"the profile cannot be used: there is no built-in profile {name!r}; there are {', '.join(NAMES)}"
        )
    return members
