"""Pages of package builds, and of the farm: what ``templates/pages`` has for each is filled in here, a
file a page; ``write`` says which are written when.

They lie beside what they are about, in the farm's state: ``packages/NAME/index.html`` and
``packages/NAME/NUMBER/index.html``, ``builds/index.html``; those of the whole farm in ``pages/``, where
``index.html`` leads to all others. All links are relative: ``pages``, ``packages`` and ``builds``, side
by side, can be copied or served; nothing else of the farm's state is to be. Each can be made again from
the records."""
