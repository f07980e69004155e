"""The kinds of a cycle's steps, each by the key that such a step is known by."""

STEPS = {
    "reset": "builds.steps.reset:ResetStep",
    "checkout": "builds.steps.checkout:CheckoutStep",
    "run": "builds.steps.run:RunStep",
    "transfer": "builds.steps.transfer:TransferStep",
    "use": "builds.steps.use:UseStep",
    "publish": "builds.steps.publish:PublishStep",
    "fetch": "builds.steps.fetch:FetchStep",
}
