"""All traffic with the Hugging Face Hub: fetching models and publishing them.

``HF_TOKEN``, ``HF_HOME``, ``HF_ENDPOINT`` and ``HF_HUB_OFFLINE`` are honoured by ``huggingface_hub`` itself; the token
goes from there into request headers and nowhere else.
"""

from llmconvert.hub.errors import hub_errors, without_tokens
from llmconvert.hub.fetch import (
    FetchedModel,
    RemoteModel,
    fetch,
    fetch_adapter,
    fetch_without_weights,
    missing_weights,
)
from llmconvert.hub.plan import PlannedFile, PushOptions, PushPlan, plan_push
from llmconvert.hub.push import check_card, check_push, push_folder, reaches_hub
from llmconvert.hub.retry import Backoff
from llmconvert.hub.transfer import RemoteFile, download_file, iterate_content, list_files

__all__ = [
    "Backoff",
    "FetchedModel",
    "PlannedFile",
    "PushOptions",
    "PushPlan",
    "RemoteFile",
    "RemoteModel",
    "check_card",
    "check_push",
    "download_file",
    "fetch",
    "fetch_adapter",
    "fetch_without_weights",
    "hub_errors",
    "iterate_content",
    "list_files",
    "missing_weights",
    "plan_push",
    "push_folder",
    "reaches_hub",
    "without_tokens",
]
