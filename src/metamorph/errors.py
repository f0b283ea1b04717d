"""Every exception that MetaMorph raises on purpose.

    MetaMorphError
    ├── ConfigError            a setting is unknown, of the wrong type, or contradicts another    (also a ValueError)
    ├── DataError              something that was read cannot be used                             (also a ValueError)
    │   ├── RecordError        ... a conversation: its structure, roles, or line in a file
    │   └── MediaError         ... an image or video: missing, broken, too large, outside the root
    ├── AlignmentError         two counts that must agree do not: positions, tokens, targets      (also a ValueError)
    ├── TemplateError          a chat template from which the assistant's words cannot be told
    ├── ContextLengthError     a conversation is longer than the context                          (also a ValueError)
    ├── CheckpointError        a checkpoint is missing, half-written, or of another shape
    ├── HubError               the hub does not answer, or refuses
    ├── TrainingError          training cannot go on
    │   └── NonFiniteLossError ... because a loss or gradient is not a finite number
    └── ComponentError         a part of the microworld misses its gate

A message reads `{what was found} but {what was expected} ({place}). {remedy}`, with both numbers where there are two.
Each class takes one message string, so that all of them survive the way back from a worker process.
"""


class MetaMorphError(Exception):
    """Base of all errors raised on purpose; catch it to tell a refusal from a bug."""


class ConfigError(MetaMorphError, ValueError):
    """A setting is unknown, of the wrong type, or contradicts another one."""


class DataError(MetaMorphError, ValueError):
    """Something that was read cannot be used as data."""

    fault: tuple[str, str, str, str] | None = None
    """Of what was told as a fault first: (code, found, expected, remedy), for reports; see `metamorph.data.faults`."""


class RecordError(DataError):
    """A conversation, or the line of a file that should hold one, is malformed."""


class MediaError(DataError):
    """An image or video is missing, broken, larger than the limits, or outside its root."""


class AlignmentError(MetaMorphError, ValueError):
    """Two counts that must agree do not: image positions and visual tokens, targets and losses."""


class TemplateError(MetaMorphError):
    """A chat template does not let us find exactly what the assistant said."""


class ContextLengthError(MetaMorphError, ValueError):
    """A conversation needs more positions than the context has; it is never cut silently."""


class CheckpointError(MetaMorphError):
    """A checkpoint is missing, half-written, of another shape, or lacks the special tokens."""


class HubError(MetaMorphError):
    """The hub cannot be reached, or does not do what was asked of it; the client's own error is the cause."""


class TrainingError(MetaMorphError):
    """Training cannot go on."""


class NonFiniteLossError(TrainingError):
    """A loss or gradient is not finite; the message holds the step and the ids of its records."""


class ComponentError(MetaMorphError):
    """A part of the microworld does not reach the score it is required to reach."""
