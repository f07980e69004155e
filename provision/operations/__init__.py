"""The operations of a farm, a file each: what can be asked, how it is carried out, how it is
recovered."""

OPERATIONS = {
    "adopt": "provision.operations.adopt:Adopt",
    "balloon": "provision.operations.balloon:Balloon",
    "balloon-all": "provision.operations.balloon:BalloonAll",
    "checkpoint": "provision.operations.checkpoint:TakeCheckpoint",
    "clone-farm": "provision.operations.clone:CloneFarm",
    "destroy": "provision.operations.destroy:Destroy",
    "gc": "provision.operations.gc:Gc",
    "merge": "provision.operations.merge:Merge",
    "network-apply": "provision.network.apply:NetworkApply",
    "recover": "provision.operations.recover:Recover",
    "repo-add": "provision.operations.repositories:RepoAdd",
    "repo-gc": "provision.operations.repository_upkeep:RepoGc",
    "repo-import": "provision.operations.repository_upkeep:RepoImport",
    "repo-promote": "provision.operations.repositories:RepoPromote",
    "repo-remove": "provision.operations.repositories:RepoRemove",
    "repo-rollback": "provision.operations.repositories:RepoRollback",
    "repo-sync": "provision.operations.repository_sync:RepoSync",
    "reset": "provision.operations.reset:Reset",
    "start": "provision.power:Start",
    "stop": "provision.power:Stop",
    "template-build": "provision.operations.templates:TemplateBuild",
    "template-import": "provision.operations.templates:TemplateImport",
    "template-remove": "provision.operations.templates:TemplateRemove",
}
"""By name, its class."""

ACTIVITIES = {
    "adopt": "provision.operations.adopt:ADOPT",
    "adopt-template": "provision.operations.adopt:ADOPT_TEMPLATE",
    "balloon": "provision.memory_budget:BALLOON",
    "checkpoint": "provision.operations.checkpoint:CHECKPOINT",
    "clone": "provision.operations.clone:CLONE",
    "destroy": "provision.operations.destroy:DESTROY",
    "gc": "provision.operations.gc:GC",
    "merge": "provision.operations.merge:MERGE",
    "network-apply": "provision.network.rollback:APPLY",
    "redefine": "provision.operations.clone:REDEFINE",
    "repository": "provision.package_repositories:REPOSITORY",
    "reset": "provision.operations.reset:RESET",
    "start": "provision.power:START",
    "stop": "provision.power:STOP",
    "template-build": "provision.operations.templates:BUILD",
    "template-remove": "provision.operations.templates:REMOVE",
    "template-seal": "provision.operations.templates:SEAL",
    "wait": "provision.power:WAIT",
}
"""By the name in the journal, what recovers it."""
