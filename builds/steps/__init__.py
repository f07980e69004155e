"""The kinds of a cycle's steps, each by the key that such a step is known by."""

KINDS = {
    "reset": "builds.steps.reset:ResetStep",
    "run": "builds.steps.run:RunStep",
    "transfer": "builds.steps.transfer:TransferStep",
}
