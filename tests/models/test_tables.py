"""The tables of facts about providers: each row is played, and none can go without a test that fails."""

import base64
import json
import re
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import pytest
from notecase_server.models.answers import error_table, finish_reasons, media, think_tags, too_long, usage
from notecase_server.models.answers.error_table import Verdict
from notecase_server.models.answers.finish_reasons import Finish
from notecase_server.models.answers.provider_errors import judge, told_by, told_by_body
from notecase_server.models.contract import Reasoning

FINISH: Sequence[tuple[str, Finish]] = (
    ("STOP", Finish.WHOLE),
    ("endTurn", Finish.WHOLE),
    ("stop-sequence", Finish.WHOLE),
    ("EOS", Finish.WHOLE),
    ("eos_token", Finish.WHOLE),
    ("eos found", Finish.WHOLE),
    ("stop_token", Finish.WHOLE),
    ("COMPLETE", Finish.WHOLE),
    ("completed", Finish.WHOLE),
    ("done", Finish.WHOLE),
    ("end", Finish.WHOLE),
    ("FINISH", Finish.WHOLE),
    ("finished", Finish.WHOLE),
    ("normal", Finish.WHOLE),
    ("success", Finish.WHOLE),
    ("FinishReason.TOOL_CALLS", Finish.CALLS),
    ("TOOL_CALL", Finish.CALLS),
    ("tool_use", Finish.CALLS),
    ("function_call", Finish.CALLS),
    ("functionCalls", Finish.CALLS),
    ("incomplete", Finish.LIMIT),
    ("FINISH_REASON_LENGTH", Finish.LIMIT),
    ("token_limit", Finish.LIMIT),
    ("MAX_TOKENS", Finish.LIMIT),
    ("repetition_detected", Finish.LIMIT),
    ("truncated", Finish.LIMIT),
    ("budget_exceeded", Finish.LIMIT),
    ("loop_detected", Finish.LIMIT),
    ("pause_turn", Finish.LIMIT),
    ("context deadline exceeded", Finish.FAILED),
    ("context_full", Finish.TOO_LONG),
    ("kv_cache_full", Finish.TOO_LONG),
    ("prompt_too_long", Finish.TOO_LONG),
    ("IMAGE_RECITATION", Finish.FILTERED),
    ("IMAGE_PROHIBITED_CONTENT", Finish.FILTERED),
    ("IMAGE_OTHER", Finish.FAILED),
    ("TOO_MANY_TOOL_CALLS", Finish.FAILED),
    ("model_context_window_exceeded", Finish.TOO_LONG),
    ("context_length_exceeded", Finish.TOO_LONG),
    ("content_filter", Finish.FILTERED),
    ("guardrail_intervened", Finish.FILTERED),
    ("refusal", Finish.FILTERED),
    ("IMAGE_SAFETY", Finish.FILTERED),
    ("RECITATION", Finish.FILTERED),
    ("BLOCKLIST", Finish.FILTERED),
    ("prompt_blocked", Finish.FILTERED),
    ("content_policy", Finish.FILTERED),
    ("PROHIBITED_CONTENT", Finish.FILTERED),
    ("SPII", Finish.FILTERED),
    ("LANGUAGE", Finish.FILTERED),
    ("sensitive", Finish.FILTERED),
    ("ERROR_TOXIC", Finish.FILTERED),
    ("moderation", Finish.FILTERED),
    ("network_error", Finish.FAILED),
    ("ABORTED", Finish.FAILED),
    ("canceled", Finish.FAILED),
    ("timeout", Finish.FAILED),
    ("timed out", Finish.FAILED),
    ("insufficient_system_resource", Finish.FAILED),
    ("engine_overloaded", Finish.FAILED),
    ("failed", Finish.FAILED),
    ("interrupted", Finish.FAILED),
    ("client_disconnected", Finish.FAILED),
    ("backend_unavailable", Finish.FAILED),
    ("preempted", Finish.FAILED),
    ("OTHER", Finish.FAILED),
    ("OOM", Finish.FAILED),
    ("exception", Finish.FAILED),
    ("worker_crashed", Finish.FAILED),
    ("killed", Finish.FAILED),
    ("terminated", Finish.FAILED),
    ("server_shutdown", Finish.FAILED),
    ("evicted", Finish.FAILED),
    ("out of memory", Finish.FAILED),
    ("rejected", Finish.FAILED),
    ("quota_limit", Finish.FAILED),
    ("rateLimit", Finish.FAILED),
    ("busy", Finish.FAILED),
    ("stalled", Finish.FAILED),
    ("expired", Finish.FAILED),
    ("internal", Finish.FAILED),
    ("content_policy_rejected", Finish.FILTERED),
    ("safetyRejected", Finish.FILTERED),
    ("filter_exception", Finish.FILTERED),
    ("time_limit_expired", Finish.LIMIT),
    ("maxTokensTerminated", Finish.LIMIT),
    ("killed_by_limit", Finish.LIMIT),
    ("context_length_rejected", Finish.TOO_LONG),
    ("MALFORMED_FUNCTION_CALL", Finish.AGAIN),
    ("unexpected_tool_call", Finish.AGAIN),
    ("a word of its own", Finish.UNKNOWN),
)

STATUSES: Sequence[tuple[int, Verdict]] = (
    (400, Verdict.REFUSED),
    (401, Verdict.CREDENTIAL),
    (402, Verdict.ACCOUNT),
    (403, Verdict.REFUSED),
    (408, Verdict.PASSING),
    (409, Verdict.PASSING),
    (424, Verdict.PASSING),
    (425, Verdict.PASSING),
    (429, Verdict.PASSING),
    (498, Verdict.PASSING),
    (499, Verdict.PASSING),
    (501, Verdict.REFUSED),
    (503, Verdict.PASSING),
    (505, Verdict.REFUSED),
    (529, Verdict.PASSING),
)

CODES: Sequence[tuple[Any, Verdict]] = (
    ({"error": {"code": "insufficient_quota", "message": "x"}}, Verdict.ACCOUNT),
    ({"error": {"code": "billing_hard_limit_reached"}}, Verdict.ACCOUNT),
    ({"error": {"code": "billing_not_active"}}, Verdict.ACCOUNT),
    ({"code": 403, "reason": "no", "type": "NOT_ENOUGH_BALANCE"}, Verdict.ACCOUNT),
    ({"error": {"type": "insufficient_funds"}}, Verdict.ACCOUNT),
    ({"error": {"type": "usage_limit_reached"}}, Verdict.ACCOUNT),
    ({"error": {"code": "AccountOverdueError"}}, Verdict.ACCOUNT),
    ({"error": {"code": "SetLimitExceeded"}}, Verdict.ACCOUNT),
    ({"error": {"code": "1308"}}, Verdict.ACCOUNT),
    ({"error": {"code": "1310"}}, Verdict.ACCOUNT),
    ({"error": {"type": "exceeded_current_quota_error"}}, Verdict.ACCOUNT),
    ({"code": "Arrearage", "message": "Access denied."}, Verdict.ACCOUNT),
    ({"error": {"code": "INSUFFICIENT_BALANCE"}}, Verdict.ACCOUNT),
    ({"error": {"code": "insufficient_credits"}}, Verdict.ACCOUNT),
    ({"error": {"code": "insufficient_user_quota"}}, Verdict.ACCOUNT),
    ({"error": {"code": "1113", "message": "x"}}, Verdict.ACCOUNT),
    ({"base_resp": {"status_code": 1008, "status_msg": "x"}}, Verdict.ACCOUNT),
    ({"error": {"type": "budget_exceeded"}}, Verdict.ACCOUNT),
    ({"error": {"type": "billing_error"}}, Verdict.ACCOUNT),
    ({"error": {"code": "payment_required"}}, Verdict.ACCOUNT),
    ({"error": {"code": "quota_exceeded"}}, Verdict.ACCOUNT),
    ({"error": {"code": "credits_exhausted"}}, Verdict.ACCOUNT),
    ({"error": {"code": "invalid_api_key"}}, Verdict.CREDENTIAL),
    ({"type": "error", "error": {"type": "authentication_error"}}, Verdict.CREDENTIAL),
    ({"error": {"type": "invalid_authentication_error"}}, Verdict.CREDENTIAL),
    ([{"error": {"status": "UNAUTHENTICATED"}}], Verdict.CREDENTIAL),
    ({"error": {"code": "unauthorized"}}, Verdict.CREDENTIAL),
    ({"error": {"code": "account_deactivated"}}, Verdict.CREDENTIAL),
    ({"base_resp": {"status_code": 1004}}, Verdict.CREDENTIAL),
    ({"base_resp": {"status_code": "2049"}}, Verdict.CREDENTIAL),
    ({"error_code": 110, "error_msg": "x"}, Verdict.CREDENTIAL),
    ({"error_code": 111, "error_msg": "x"}, Verdict.CREDENTIAL),
    ({"error": {"code": "tool_use_failed"}}, Verdict.AGAIN),
    ({"error": {"code": "json_validate_failed"}}, Verdict.AGAIN),
    ({"error": {"code": "output_parse_failed"}}, Verdict.AGAIN),
    ({"error": {"code": "MALFORMED_FUNCTION_CALL"}}, Verdict.AGAIN),
    ({"error": {"code": "model_output_invalid"}}, Verdict.AGAIN),
    ({"error": {"code": "rate_limit_exceeded"}}, Verdict.PASSING),
    ({"error": {"type": "rate_limit_error"}}, Verdict.PASSING),
    ({"error": {"type": "rate_limit_reached_error"}}, Verdict.PASSING),
    ([{"error": {"status": "RESOURCE_EXHAUSTED"}}], Verdict.PASSING),
    ({"code": "Throttling"}, Verdict.PASSING),
    ({"code": "Throttling.RateQuota"}, Verdict.PASSING),
    ({"code": "Throttling.AllocationQuota"}, Verdict.PASSING),
    ({"__type": "ThrottlingException"}, Verdict.PASSING),
    ({"error": {"type": "overloaded_error"}}, Verdict.PASSING),
    ({"error": {"type": "engine_overloaded_error"}}, Verdict.PASSING),
    ({"error": {"type": "server_error"}}, Verdict.PASSING),
    ({"error": {"type": "api_error"}}, Verdict.PASSING),
    ({"object": "error", "type": "InternalServerError"}, Verdict.PASSING),
    ({"code": "InternalError"}, Verdict.PASSING),
    ([{"error": {"status": "UNAVAILABLE"}}], Verdict.PASSING),
    ({"error": {"code": "service_unavailable"}}, Verdict.PASSING),
    ({"error": {"type": "timeout_error"}}, Verdict.PASSING),
    ([{"error": {"status": "DEADLINE_EXCEEDED"}}], Verdict.PASSING),
    ({"__type": "ModelNotReadyException"}, Verdict.PASSING),
    ({"__type": "ModelStreamErrorException"}, Verdict.PASSING),
    ({"error": {"code": "model_loading"}}, Verdict.PASSING),
    ({"error": {"code": "1302"}}, Verdict.PASSING),
    ({"error": {"code": "1305"}}, Verdict.PASSING),
    ({"error": {"code": "1234"}}, Verdict.PASSING),
    ({"base_resp": {"status_code": 1000}}, Verdict.PASSING),
    ({"base_resp": {"status_code": 1001}}, Verdict.PASSING),
    ({"base_resp": {"status_code": 1002}}, Verdict.PASSING),
    ({"base_resp": {"status_code": 1013}}, Verdict.PASSING),
    ({"base_resp": {"status_code": 1024}}, Verdict.PASSING),
    ({"base_resp": {"status_code": 1033}}, Verdict.PASSING),
    ({"error_code": 4}, Verdict.PASSING),
    ({"error_code": 18}, Verdict.PASSING),
    ({"error_code": 336100}, Verdict.PASSING),
    ({"error_code": 336501}, Verdict.PASSING),
    ({"error": {"type": "invalid_request_error"}}, Verdict.REFUSED),
    ({"error": {"type": "invalid_request"}}, Verdict.REFUSED),
    ({"object": "error", "type": "BadRequestError"}, Verdict.REFUSED),
    ({"error": {"code": "bad_request"}}, Verdict.REFUSED),
    ([{"error": {"status": "INVALID_ARGUMENT"}}], Verdict.REFUSED),
    ([{"error": {"status": "FAILED_PRECONDITION"}}], Verdict.REFUSED),
    ({"code": "InvalidParameter"}, Verdict.REFUSED),
    ({"error": {"code": "invalid_parameter_error"}}, Verdict.REFUSED),
    ({"__type": "ValidationException"}, Verdict.REFUSED),
    ({"error": {"type": "not_found_error"}}, Verdict.REFUSED),
    ({"error": {"code": "model_not_found"}}, Verdict.REFUSED),
    ([{"error": {"status": "NOT_FOUND"}}], Verdict.REFUSED),
    ({"error": {"type": "permission_error"}}, Verdict.REFUSED),
    ([{"error": {"status": "PERMISSION_DENIED"}}], Verdict.REFUSED),
    ({"error": {"code": "content_filter"}}, Verdict.REFUSED),
    ({"error": {"code": "content_policy_violation"}}, Verdict.REFUSED),
    ({"error": {"code": "data_inspection_failed"}}, Verdict.REFUSED),
    ({"error": {"code": "1301"}}, Verdict.REFUSED),
    ({"base_resp": {"status_code": 1026}}, Verdict.REFUSED),
    ({"base_resp": {"status_code": 1027}}, Verdict.REFUSED),
    ({"base_resp": {"status_code": 2013}}, Verdict.REFUSED),
)

WORDS: Sequence[tuple[str, Verdict]] = (
    ('Error rendering prompt with jinja template: "Unknown test: sequence". Try again later.', Verdict.REFUSED),
    ("Failed to apply the chat template: temporary variable is undefined", Verdict.REFUSED),
    ("Your account has an insufficient balance.", Verdict.ACCOUNT),
    ("Insufficient credits. Add more.", Verdict.ACCOUNT),
    ("This request requires more credits, or fewer max_tokens.", Verdict.ACCOUNT),
    ("Your credit balance is too low to access the API.", Verdict.ACCOUNT),
    ("User balance is not enough", Verdict.ACCOUNT),
    ("Your quota has been exhausted", Verdict.ACCOUNT),
    ("Budget has been exceeded! Current cost: 10, Max budget: 5", Verdict.ACCOUNT),
    ("Key limit exceeded (total limit).", Verdict.ACCOUNT),
    ("Your team has used all available credits.", Verdict.ACCOUNT),
    ("You have exceeded your monthly included credits.", Verdict.ACCOUNT),
    ("Please make sure your account is in good standing.", Verdict.ACCOUNT),
    ("账户余额不足", Verdict.ACCOUNT),
    ("No quota is left for this minute", Verdict.PASSING),
    ("Your quota of requests is exhausted. Please wait 10 seconds.", Verdict.PASSING),
    ("The thinking budget is exceeded: not supported", Verdict.REFUSED),
    ("用户剩余额度: $0.00", Verdict.ACCOUNT),
    ("Sorry, your account balance is insufficient", Verdict.ACCOUNT),
    ("Quota exceeded and account balance is $0.0, please pay", Verdict.ACCOUNT),
    ("Insufficient USD or Diem balance to complete the request", Verdict.ACCOUNT),
    ("You've run out of credits", Verdict.ACCOUNT),
    ("Not enough credits", Verdict.ACCOUNT),
    ("Your prepayment credits are depleted.", Verdict.ACCOUNT),
    ("The free tier of the model has been exhausted.", Verdict.ACCOUNT),
    ("Billing hard limit has been reached", Verdict.ACCOUNT),
    ("Your account is not active, please check your billing details.", Verdict.ACCOUNT),
    ("Credit limit exceeded", Verdict.ACCOUNT),
    ("Weekly/Monthly Limit Exhausted. Your limit will reset at 2026-12-01", Verdict.ACCOUNT),
    ("You have used up your daily free allocation of 10,000 neurons", Verdict.ACCOUNT),
    ("ExceededBudget: Crossed spend within the team", Verdict.ACCOUNT),
    ("You exceeded your current quota, please check your plan and billing details.", Verdict.PASSING),
    ("Incorrect API key provided.", Verdict.CREDENTIAL),
    ("API key not valid. Please pass a valid API key.", Verdict.CREDENTIAL),
    ("Authentication fails (no such user).", Verdict.CREDENTIAL),
    ("Failed to call a function. Please adjust your prompt.", Verdict.AGAIN),
    ("The server failed to parse tool output.", Verdict.AGAIN),
    ("error parsing tool call: invalid character", Verdict.AGAIN),
    ("The model is at capacity; its queue must be drained first.", Verdict.PASSING),
    ("Rate limit: more than 3 calls are not allowed.", Verdict.PASSING),
    ("Upstream gave an invalid answer. Please try again.", Verdict.PASSING),
    ("Request timed out; a response is required.", Verdict.PASSING),
    ("The model is currently loading and not found on any worker.", Verdict.PASSING),
    ("'top_k' is not supported by this model.", Verdict.REFUSED),
    ("Your input was flagged.", Verdict.REFUSED),
)

TOO_LONG_CODES = (
    "context_length_exceeded",
    "exceed_context_size_error",
    "context_exceeded",
    "context-window-exceeded",
    "ContextWindowExceededError",
    "tokens_limit_reached",
    "model_max_prompt_tokens_exceeded",
    "request_too_large",
    "prompt_too_long",
    "InputTooLong",
    "context_too_long",
    "context_limit_exceeded",
    "input_token_limit_exceeded",
    "token_limit_exceeded",
    "1261",
    "10907",
)

TOO_LONG = (
    "This model's maximum context length is 4096 tokens, your messages resulted in 5000 tokens.",
    "Your input exceeds the context window of this model.",
    "Input tokens exceed the configured limit of 272,000 tokens.",
    "The decoder prompt (length 5000) is longer than the maximum model length of 4096.",
    "The request's 5000 tokens exceeds the model's maximum length of 4096.",
    "The input (5000 tokens) is longer than the model's context length (4096 tokens).",
    "Requested token count exceeds what the server was started for.",
    "The input token count (5000) exceeds the maximum of 4096.",
    "Unable to submit request because the input token count is 5000 but the model only takes 4096.",
    "prompt is too long: 5000 tokens > 4096 maximum",
    "input length and `max_tokens` exceed context limit: 4000 + 1000 > 4096",
    "Input is too long for requested model.",
    "too many tokens: total tokens must be less than 4096",
    "This model's maximum prompt length is 4096 but the request contains 5000 tokens.",
    "Please reduce the length of your prompt.",
    "Input validation error: `inputs` must have less than 4096 tokens. Given: 5000",
    "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 4096. Given: 4000 `inputs` tokens and 97",
    "Range of input length should be [1, 4096]",
    "Prompt exceeds max length",
    "Request body too large for some model. Max size: 4096 tokens.",
    "prompt token count of 5000 exceeds the limit of 4096",
    "Input length 5000 is above the maximum allowed input length of 4096 tokens.",
    "the request exceeds the available context size, try increasing it",
    "The number of tokens to keep is greater than the context length",
    "context length is exceeded; context length of 4096 exceeded",
    "Reached context length of 4096 tokens with this model, and the policy is to stop",
    "invalid params, context window exceeds limit",
    "Your request exceeded model token limit: 4096",
    "the input length exceeds the max of 4096 characters",
    "prompt tokens too long",
    "Prompt contains 5000 tokens, too large for model with 4096 maximum context",
    "Prompt contains 5000 tokens and 0 draft tokens, too large to be served",
    "the prompt length (5000) exceeds what was built",
    "The prompt is too long: 5000, model maximum length: 4096",
    "The prompt has 5000 tokens, which exceeds 4096",
    "The request exceeds the maximum number of input tokens allowed",
    "the number of input tokens 5000 cannot exceed the total tokens limit 4096",
    "input of 5000 is above max_seq_len 4096",
    "Current length is 5000 while limit is 4096",
    "Request too large for model `x`",
    "Context size has been exceeded.",
    "Requested tokens (9000) exceed context window of 8192",
    "This request would exceed the model's context window",
    "The estimated number of tokens (9000) exceeded this model context window limit (8192).",
    "Trying to keep the first 9000 tokens when context the overflows. However, the model is loaded with 4096 tokens",
    "The prompt is 9000 tokens long, but the maximum supported sequence length is just 8192!",
    "InternalError.Algo.InvalidParameter: Total message token length exceed model limit",
    "Total tokens of image and text exceed max message tokens.",
    "The sum of prompt length (9000) and max tokens (512) should not exceed max_num_tokens (8192)",
    "expected maxLength: 42000, actual: 50000, please reformat your input and try again.",
    "Prompt too long",
    "The conversation is too long, please try again with a shorter conversation.",
    "Your messages are too long",
    "The input exceeds the model's maximum input length",
    "Your request exceeds the maximum token limit of 8192",
    "prompt token length 9000 exceeds the max model len 8192",
    "Input token length too long",
    "The length of tokens in the request is too long",
    "'$.messages' is too long. Maximum length is 2048",
    "Invalid 'messages': array too long. Expected an array with maximum length 2048.",
    "Prompt too large for this model",
    "Too many messages: maximum 100 messages",
    "too many total text bytes: 9000001 > 9000000",
    "Token limit exceeded",
    "Request contains 5000 tokens, which exceeds the limit of 4096",
    "Your request has a token count of 5000 which is above the limit of 4096",
    "Input token length must be less than 4096",
    "This model supports at most 4096 tokens, your request has 5000",
    "Failed to generate completion: context overflow",
    "the prompt does not fit into the context",
    "upstream: context window is full",
    "n_prompt_tokens exceeds n_ctx",
    "n_keep: 5000 >= n_ctx: 4096",
    "Model context window is 128k tokens, you requested 256k tokens",
    "Prompt has 5,000 tokens, but the configured context size is 4,096 tokens",
    "Input exceeds the maximum length of 4096",
    "Input length (5000) exceeds model's maximum context length (4096).",
    "Conversation length exceeded. Please start a new session",
    "The current model has reached its conversation limit",
    "Request payload size exceeds the limit: 20971520 bytes.",
    "Input length of input_ids is 5000, but `max_length` is set to 4096",
    "对话内容过长",
    "输入内容过长",
    "输入超长",
    "prompt长度超过最大限制",
    "请求token数超过模型限制",
    "上下文过多, 请压缩上下文",
    "超出上下文限制",
)

NOT_TOO_LONG = (
    "max_tokens (9000) exceeds the maximum token limit",
    "'max_tokens' is too large: 9000. This model's maximum context length is 4096 tokens.",
    "This model's maximum context length is 8192 tokens, but it supports at most 4096 completion tokens.",
    "max_tokens (9000) exceeds the model's limit; the maximum context length is 4096 tokens.",
    "Range of max_tokens should be [1, 8192]; range of input length should be [1, 4096] in all.",
    "Invalid 'prompt': string too long. Expected a string with maximum length 4096.",
    "The request's function description is too long.",
    "Request too large for model `x` on tokens per minute",
    "The number of output tokens exceeds the limit",
    "Requested max tokens exceeds the maximum output tokens of 4096",
    "Requested max_tokens exceeds the limit of 8192 tokens",
    "max_completion_tokens cannot exceed 16384 tokens",
    "The thinking budget exceeds the maximum of 24576 tokens",
    "The stop sequence is too long",
    "Invalid input: image exceeds the 5 MB maximum",
    "Invalid messages: tool call id exceeds the maximum length of 40",
    "The prompt exceeds the allowed severity of the safety system",
    "The tokens in flight exceed the capacity of the server",
    "请求超时,请重试",
    "系统繁忙,请求超载",
    "请求QPS超限",
    "请求内容涉及敏感信息,超出范围",
    "max_tokens=9000 cannot be greater than max_model_len=4096",
    "The image in the request is too large",
    "Request Header Or Cookie Too Large",
    "图片内容过大",
    "Request rate is too large",
    "Too many tokens, please wait before trying again.",
    "Daily token limit exceeded",
    "Monthly token quota exceeded",
    "request reached organization TPD rate limit, current: 1506556, limit: 1500000",
    "请求频率超过限制",
    "context deadline exceeded (Client.Timeout exceeded while awaiting headers)",
    "context canceled",
    "Your request took too long.",
    "The request has been waiting too long",
    "Timeout exceeded while waiting for tokens",
    "You have exceeded the number of tokens that your account has left",
    "Model context window too small: the minimum is 1000",
    "request exceeds the maximum number of concurrent requests",
    "Invalid 'tools': array too long. Expected an array with maximum length 128.",
    "temperature must be less than 2",
)

SHARES = (
    "This model's maximum context length is 4096 tokens. However, you requested 9012 tokens (12 in the messages, 9000"
    " in the completion).",
    "This model's maximum context length is 4096 tokens. However, you requested 9000 output tokens and your prompt"
    " contains at least 12 input tokens.",
    "`inputs` tokens + `max_new_tokens` must be <= 4096. Given: 12 `inputs` tokens and 9000 `max_new_tokens`",
    "input length and `max_tokens` exceed context limit: 12 + 9000 > 4096",
)

USAGE = tuple((place.field, place.path) for place in usage.PLACES)

TAGGED = (
    "<think>hm</think>Hi",
    "<thinking>hm</thinking>Hi",
    "<thought>hm</thought>Hi",
    "<reasoning>hm</reasoning>Hi",
    "[THINK]hm[/THINK]Hi",
    "<seed:think>hm</seed:think>Hi",
    "◁think▷hm◁/think▷Hi",
    "<|inner_prefix|>hm<|inner_suffix|>Hi",
    "<Thought>hm</Thought>Hi",
    "<reason>hm</reason>Hi",
    "<|begin_of_thought|>hm<|end_of_thought|>Hi",
    "<|channel>thoughthm<channel|>Hi",
    "<|START_THINKING|>hm<|END_THINKING|>Hi",
    "<longcat_think>hm</longcat_think>Hi",
    "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>Hi",
)


PNG = base64.b64encode(b"\x89PNG").decode()
NO_FORMAT = base64.b64encode(b"?").decode()

IMAGES: Sequence[Any] = (
    {"image_url": {"url": PNG}},
    {"image_url": PNG},
    {"inline_data": {"data": PNG}},
    {"inlineData": {"data": PNG}},
    {"source": {"data": PNG}},
    {"source": {"url": "https://example.org/a"}},
    {"url": PNG},
    {"b64_json": PNG},
    {"result": PNG},
    {"data": PNG},
)

IMAGE_TYPES: Sequence[Any] = (
    {"inline_data": {"data": PNG, "mime_type": "image/tiff"}},
    {"inlineData": {"data": PNG, "mimeType": "image/tiff"}},
    {"source": {"data": PNG, "media_type": "image/tiff"}},
    {"data": PNG, "mime_type": "image/tiff"},
    {"data": PNG, "mimeType": "image/tiff"},
)

CONTENT = (
    (b"\x89PNG\r\n", "image/png", "image-1.png"),
    (b"\xff\xd8\xff\xe0", "image/jpeg", "image-1.jpg"),
    (b"GIF89a", "image/gif", "image-1.gif"),
    (b"RIFF\x10\0\0\0WEBPVP8 ", "image/webp", "image-1.webp"),
    (b"RIFF\x10\0\0\0WAVEfmt ", "audio/wav", "image-1.wav"),
    (b"ID3\x04", "audio/mpeg", "image-1.mp3"),
    (b"\xff\xfb\x90", "audio/mpeg", "image-1.mp3"),
    (b"fLaC\0", "audio/flac", "image-1.flac"),
    (b"OggS\0", "audio/ogg", "image-1.ogg"),
    (b"\xff\xf1\x50", "audio/aac", "image-1.aac"),
    (b"BM", "application/octet-stream", "image-1"),
)

AUDIO = (
    ("wav", "audio/wav"),
    ("mp3", "audio/mpeg"),
    ("flac", "audio/flac"),
    ("opus", "audio/ogg"),
    ("aac", "audio/aac"),
)


def told(data: bytes) -> tuple[str, str]:
    made = media.decoded(media.Encoded((base64.b64encode(data).decode(),), "image"), 1)
    return made.media_type, made.filename


def heard(name: str) -> str:
    return media.decoded(media.Encoded((NO_FORMAT,), "audio", name=name), 1).media_type


def by_code(body: Any) -> tuple[Verdict, Verdict]:
    """What the error means within a reply, and as a refusal with status 400: codes tell in one of them at least."""
    return judge(None, told_by(body)), judge(400, told_by(body))


def counted(path: tuple[str, ...]) -> Any:
    told: Any = 7
    for name in reversed(path):
        told = {name: told}
    counts = usage.Counts()
    counts.take(told)
    return counts.usage("m")


def thought(text: str) -> str:
    tags = think_tags.ThinkTags()
    return "".join(piece.text for piece in [*tags.feed(text), *tags.end()] if isinstance(piece, Reasoning))


@pytest.mark.parametrize(("word", "means"), FINISH)
def test_finish_reasons(word: str, means: Finish) -> None:
    assert means is finish_reasons.meaning(word)


def test_a_finish_reason_means_the_same_in_whatever_case_and_with_whatever_prefix() -> None:
    words = [row.word for row in (*finish_reasons.WORDS, *finish_reasons.PARTS)]
    plain = [finish_reasons.meaning(word) for word in words]
    assert plain == [finish_reasons.meaning(f"FinishReason.FINISH_REASON_{word}".upper()) for word in words]


@pytest.mark.parametrize(("status", "means"), STATUSES)
def test_statuses(status: int, means: Verdict) -> None:
    assert means is judge(status, told_by({}))


@pytest.mark.parametrize(("body", "means"), CODES, ids=lambda value: re.sub(r"\W+", " ", str(value)).strip())
def test_codes(body: Any, means: Verdict) -> None:
    within, refused = by_code(body)
    assert means is (refused if means is Verdict.PASSING else within)


@pytest.mark.parametrize(("words", "means"), WORDS)
def test_words_of_an_error_without_code_and_status(words: str, means: Verdict) -> None:
    assert means is judge(None, told_by({"error": words}))


@pytest.mark.parametrize("status", [400, 403, 404, 422])
@pytest.mark.parametrize(
    ("words", "means"),
    [
        ("Rate limit exceeded", Verdict.PASSING),
        ("Too many requests", Verdict.PASSING),
        ("The server is overloaded, please retry", Verdict.PASSING),
        ("The model is currently loading", Verdict.PASSING),
        ("This model is temporarily unavailable", Verdict.PASSING),
        ("服务器繁忙", Verdict.PASSING),
        ("Please adjust your input and try again", Verdict.REFUSED),
        ("The model is not available in your region", Verdict.REFUSED),
        ("`timeout` must be a number", Verdict.REFUSED),
        ("No model is loaded", Verdict.REFUSED),
    ],
)
def test_words_of_a_transient_failure_count_before_the_status_of_a_refusal(
    status: int, words: str, means: Verdict
) -> None:
    assert means is judge(status, told_by({"error": {"message": words, "type": "invalid_request_error"}}))


@pytest.mark.parametrize("code", TOO_LONG_CODES)
def test_codes_of_requests_that_are_too_long(code: str) -> None:
    assert too_long.is_too_long(told_by({"error": {"code": code, "message": "no"}}).codes, "no")


@pytest.mark.parametrize(
    "body", [{"error_code": 336007}, {"error_code": "336103"}, {"base_resp": {"status_code": 1039}}], ids=str
)
def test_numbers_of_too_long_requests_count_in_their_members_only(body: Any) -> None:
    assert too_long.is_too_long(told_by(body).codes, "")
    number = re.sub(r"\D", "", str(body))
    assert not too_long.is_too_long(told_by({"error": {"code": number}}).codes, "")


@pytest.mark.parametrize("words", ["maximum context length is 1 tokens ", "input token count ", "Limit 1"])
def test_words_are_judged_in_part(words: str) -> None:
    """Some servers repeat the request in them, and the patterns take more than linear time."""
    told = told_by_body(json.dumps({"error": {"message": words * 9000, "code": words * 900}}).encode())
    assert (len(told.words), len(told.code)) == (8192, 256)


def test_a_mark_before_a_refusal_is_none_of_it() -> None:
    body = json.dumps({"error": {"code": "insufficient_quota", "message": "no"}}).encode()
    assert told_by_body(b"\xef\xbb\xbf" + body) == told_by_body(body)


def test_numbers_that_are_too_long_to_read_are_ignored() -> None:
    """Python reads none of that length."""
    endless = "9" * 5000
    assert not error_table.is_never_met(f"Limit {endless}, Requested 5")
    assert too_long.is_too_long((), f"exceed context limit: 1 + {endless} > 5")


@pytest.mark.parametrize("words", TOO_LONG)
def test_wordings_of_requests_that_are_too_long(words: str) -> None:
    assert too_long.is_too_long((), words)


@pytest.mark.parametrize("words", [*NOT_TOO_LONG, *SHARES])
def test_what_only_sounds_too_long(words: str) -> None:
    assert not too_long.is_too_long((), words)


@pytest.mark.parametrize(("field", "path"), USAGE)
def test_places_of_usage(field: str, path: tuple[str, ...]) -> None:
    assert 7 == getattr(counted(path), field)


@pytest.mark.parametrize("text", TAGGED)
def test_tags_of_reasoning(text: str) -> None:
    assert "hm" == thought(text)


@pytest.mark.parametrize("entry", IMAGES, ids=str)
def test_places_of_images(entry: Any) -> None:
    assert media.find(entry) is not None


@pytest.mark.parametrize("entry", IMAGE_TYPES, ids=str)
def test_places_of_media_types(entry: Any) -> None:
    found = media.find(entry)
    assert isinstance(found, media.Encoded)
    assert "image/tiff" == found.media_type


@pytest.mark.parametrize(("data", "media_type", "filename"), CONTENT)
def test_beginnings_of_content(data: bytes, media_type: str, filename: str) -> None:
    assert (media_type, filename) == told(data)


@pytest.mark.parametrize(("name", "media_type"), AUDIO)
def test_formats_in_which_audio_is_requested(name: str, media_type: str) -> None:
    assert media_type == heard(name)


NUMBERS = ({"error_code": 336007}, {"error_code": "336103"}, {"base_resp": {"status_code": 1039}})
TABLES: dict[str, tuple[ModuleType, Callable[[], Any]]] = {
    "WORDS of finish reasons": (finish_reasons, lambda: [finish_reasons.meaning(word) for word, _ in FINISH]),
    "PARTS": (finish_reasons, lambda: [finish_reasons.meaning(word) for word, _ in FINISH]),
    "STATUSES": (error_table, lambda: [judge(status, told_by({})) for status, _ in STATUSES]),
    "CODES of errors": (error_table, lambda: [by_code(body) for body, _ in CODES]),
    "WORDS of errors": (error_table, lambda: [judge(None, told_by({"error": words})) for words, _ in WORDS]),
    "CODES of too long": (
        too_long,
        lambda: [
            too_long.is_too_long(told_by(body).codes, "")
            for body in (*({"code": code} for code in TOO_LONG_CODES), *NUMBERS)
        ],
    ),
    "WORDINGS": (too_long, lambda: [too_long.is_too_long((), words) for words in TOO_LONG]),
    "OTHERS": (too_long, lambda: [too_long.is_too_long((), words) for words in NOT_TOO_LONG]),
    "SHARES": (too_long, lambda: [too_long.is_too_long((), words) for words in SHARES]),
    "PLACES": (usage, lambda: [counted(path) for _, path in USAGE]),
    "PLACES of images": (media, lambda: [media.find(entry) for entry in IMAGES]),
    "TYPES": (media, lambda: [media.find(entry) for entry in IMAGE_TYPES]),
    "FORMATS": (media, lambda: [told(data) for data, _, _ in CONTENT] + [("", heard(name)) for name, _ in AUDIO]),
    "TAGS": (think_tags, lambda: [thought(text) for text in TAGGED]),
}


@pytest.mark.parametrize(
    ("table", "row"),
    [
        (table, row)
        for table, (module, _) in TABLES.items()
        for row in range(len(getattr(module, table.partition(" ")[0])))
    ],
)
def test_no_row_can_go_unnoticed(monkeypatch: pytest.MonkeyPatch, table: str, row: int) -> None:
    module, outcome = TABLES[table]
    name = table.partition(" ")[0]
    rows = getattr(module, name)
    before = outcome()
    monkeypatch.setattr(module, name, rows[:row] + rows[row + 1 :])
    assert before != outcome(), f"nothing tells {rows[row]}"


@pytest.mark.parametrize("table", TABLES)
def test_each_row_names_its_source(table: str) -> None:
    module, _ = TABLES[table]
    assert all(row.source for row in getattr(module, table.partition(" ")[0]))
