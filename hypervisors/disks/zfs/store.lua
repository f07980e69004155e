-- What must happen within one transaction group: run by zfs-program(8), in the kernel, as
--
--     zfs program -j [-n] POOL - OPERATION POOL/DATASET FARM ARGUMENT...
--
-- FARM is the number of the farm's identity (hypervisors/ownership.py), the second word of its mark.
-- Each operation first looks at everything it depends on, then changes; so nobody comes between, and
-- a power cut shows all of it or nothing. A program can be cut short (a signal to the zfs command), so
-- changes are in an order of which every beginning is a state that hypervisors/disks/zfs/state.py reads
-- rightly. Ownership is by properties set on the very object: inherited ones name another source.
-- Returned: a table; "refused" says why nothing was changed, "errno" and "at" what the kernel said.

local argv = (...)["argv"]
local operation, root, farm = argv[1], argv[2], argv[3]
local TEMPLATES, VMS = root .. "/templates/", root .. "/vms/"
local EBUSY = 16

local function marks(name)
  local found = {}
  for property, value, source in zfs.list.user_properties(name) do
    if source == name and string.sub(property, 1, 9) == "farmhand:" then
      found[string.sub(property, 10)] = value
    end
  end
  return found
end

local function is_farms(volume)
  return string.match(volume.marks.farm or "", "^[^:]*:(%x+):") == farm
end

local function value(name, property)
  local seen = zfs.get_prop(name, property)
  return seen
end

-- Most of what is asked for opens the dataset, which costs more than all else here: no more of it than
-- is needed, and lists once only.
local function snapshots(name)
  local found = {}
  for snapshot in zfs.list.snapshots(name) do
    local seen = {marks = marks(snapshot), txg = value(snapshot, "createtxg")}
    if seen.marks.kind == "checkpoint" then
      seen.created, seen.guid = value(snapshot, "creation"), value(snapshot, "guid")
    end
    found[string.sub(snapshot, #name + 2)] = seen
  end
  return found
end

local function clones(snapshot)
  local found = {}
  for clone in zfs.list.clones(snapshot) do
    found[clone] = true
  end
  return found
end

local listed = {}
local function children(parent)
  if not listed[parent] then
    local names = {}
    if zfs.exists(parent) then
      for name in zfs.list.children(parent) do
        names[#names + 1] = name
      end
    end
    listed[parent] = names
  end
  return listed[parent]
end

-- The newest snapshot, and the newest of ours.
local function newest(volume)
  local any, ours
  for name, snapshot in pairs(volume.snapshots) do
    if not any or snapshot.txg > volume.snapshots[any].txg then
      any = name
    end
    if snapshot.marks.kind and (not ours or snapshot.txg > volume.snapshots[ours].txg) then
      ours = name
    end
  end
  return any, ours
end

-- Whether a snapshot of it is of before the disk was made larger. Gone back to, the volume would be as
-- small again, and a channel program can't set volsize.
local function smaller(volume, short)
  return volume.snapshots[short].txg <= (tonumber(volume.marks.grown) or 0)
end

-- Bytes: all of it; and since the newest snapshot of ours, since the origin where there is none of
-- anybody's.
local function measure(name, volume)
  volume.used = value(name, "used")
  if volume.newest then
    volume.written = value(name, "written@" .. volume.newest)
  elseif not next(volume.snapshots) then
    volume.written = value(name, "written")
  end
end

local function look_at(name)
  local volume = {marks = marks(name), snapshots = snapshots(name)}
  if not next(volume.marks) then
    volume.referenced = value(name, "referenced")
    volume.origin = value(name, "origin")
  end
  if volume.marks.state ~= "disk" then
    volume.created = value(name, "creation")
  end
  local _, ours = newest(volume)
  volume.newest = ours
  measure(name, volume)
  return volume
end

-- Datasets "PARENT/MACHINE.NUMBER"; of one machine, or of all ("").
local function look(parent, machine)
  local found = {}
  for _, name in ipairs(children(string.sub(parent, 1, -2))) do
    local of = string.match(string.sub(name, #parent + 1), "^(.+)%.%d+$")
    if of and (machine == "" or of == machine) then
      found[name] = look_at(name)
    end
  end
  return found
end

local function number(name)
  return tonumber(string.match(name, "%.(%d+)$"))
end

local function ours(volume, name)
  return volume.marks.machine == string.match(string.sub(name, #VMS + 1), "^(.+)%.%d+$")
end

-- The disk: of the volumes in state "disk" the one with the highest number.
local function disk_of(volumes)
  local found
  for name, volume in pairs(volumes) do
    if ours(volume, name) and volume.marks.state == "disk"
      and (not found or number(name) > number(found)) then
      found = name
    end
  end
  return found
end

local function space()
  local place = root
  while not zfs.exists(place) do
    place = string.match(place, "^(.*)/[^/]*$")
  end
  return {used = value(place, "used"), available = value(place, "available")}
end

-- Whether somebody has it open. A volume without snapshots has nothing to be rolled back to.
local function busy(name, volume)
  if next(volume.snapshots) then
    return zfs.check.rollback(name) == EBUSY
  end
  return zfs.check.destroy(name) == EBUSY
end

local function mark(name, property, text)
  return zfs.sync.set_prop(name, "farmhand:" .. property, text)
end

-- What a volume was when it became the disk.
local function start(name, base)
  local snapshot = name .. "@_start"
  local errno = zfs.sync.snapshot(snapshot)
  if errno == 0 then
    mark(snapshot, "name", base)
    mark(snapshot, "kind", "start")
  end
  return errno
end

-- What keeps a volume from being removed though nobody has it open, or nil: snapshots that aren't
-- ours, and clones of ours that are not in `also`, the volumes removed with it.
local function foreign(name, volume, also)
  for short, snapshot in pairs(volume.snapshots) do
    if not snapshot.marks.kind then
      return name .. "@" .. short
    end
    for clone in pairs(clones(name .. "@" .. short)) do
      if not also[clone] then
        return clone
      end
    end
  end
end

local function remove(name, volume)
  for short in pairs(volume.snapshots) do
    local errno = zfs.sync.destroy(name .. "@" .. short)
    if errno ~= 0 then
      return {errno = errno, at = name .. "@" .. short}
    end
  end
  local errno = zfs.sync.destroy(name)
  if errno ~= 0 then
    return {errno = errno, at = name}
  end
end

-- A checkpoint of a volume that was written with fsync holds the head of its intent log, which a rollback
-- clears (dsl_dataset_zero_zil): a block that counts as written. So what the volume is then becomes a
-- snapshot of its own, from which on it counts: true is returned beside the error number.
local function roll_back(name, volume)
  local _, own = newest(volume)
  local errno = zfs.sync.rollback(name)
  if errno ~= 0 or volume.snapshots[own].marks.kind ~= "checkpoint" then
    return errno, false
  end
  local start = name .. "@_start." .. own
  errno = zfs.sync.snapshot(start)
  if errno == 0 then
    mark(start, "name", volume.snapshots[own].marks.name)
    mark(start, "kind", "start")
  end
  return 0, true -- without room for it, it has gone back all the same, and may be hard to prove
end

local function has_checkpoint(volume)
  for _, snapshot in pairs(volume.snapshots) do
    if snapshot.marks.kind == "checkpoint" then
      return true
    end
  end
  return false
end

-- A volume that ceased to be a disk: nothing of it stays but its checkpoints.
local function retire(name, volume)
  if has_checkpoint(volume) then
    local any, own = newest(volume)
    if any == own then
      zfs.sync.rollback(name) -- gives back what was written since
    end
  elseif not foreign(name, volume, {}) then
    remove(name, volume)
  end
end

local function operate()
  if operation == "space" then
    return {space = space()}
  end

  if operation == "look" then -- [MACHINE]
    local machine = argv[4] or ""
    local answer = {space = space(), volumes = look(VMS, machine)}
    if machine == "" then
      answer.templates = look(TEMPLATES, "")
      for name, template in pairs(answer.templates) do
        for short, snapshot in pairs(template.snapshots) do
          snapshot.clones = clones(name .. "@" .. short)
        end
      end
    end
    return answer
  end

  if operation == "restore" then -- MACHINE CHECKPOINT: where the disk may stay the volume that it is
    local volumes = look(VMS, argv[4])
    local answer = {volumes = volumes}
    local name = disk_of(volumes)
    local disk = name and volumes[name]
    if disk and is_farms(disk) then
      local any, own = newest(disk)
      local back = own and any == own and disk.snapshots[own].marks.name == argv[5]
        and not smaller(disk, own)
      local untouched = not any and disk.marks.base == argv[5] and disk.written == 0
      if (back or untouched) and busy(name, disk) then
        return {refused = "busy", at = name}
      end
      if back then
        local errno, more = roll_back(name, disk)
        if errno ~= 0 then
          return {errno = errno, at = name}
        end
        if more then
          volumes[name] = look_at(name)
        else
          measure(name, disk)
        end
      elseif untouched then -- what it is now is what resets are rolled back to, from now on
        local errno = start(name, argv[5])
        if errno ~= 0 then
          return {errno = errno, at = name}
        end
      end
      answer.done = back or untouched
    end
    if not answer.done then
      answer.space = space()
    end
    return answer
  end

  if operation == "checkpoint" then -- NAME MACHINE...: all of them, or none
    local disks = {}
    for i = 5, #argv do
      local volumes = look(VMS, argv[i])
      local name = disk_of(volumes)
      if not name then
        return {refused = "no disk", at = argv[i]}
      end
      if not is_farms(volumes[name]) then
        return {refused = "foreign", at = name}
      end
      for _, volume in pairs(volumes) do
        for _, snapshot in pairs(volume.snapshots) do
          if snapshot.marks.kind == "checkpoint" and snapshot.marks.name == argv[4] then
            return {refused = "taken", at = argv[i]}
          end
        end
      end
      local errno = zfs.check.snapshot(name .. "@" .. argv[4])
      if errno ~= 0 then
        return {errno = errno, at = name .. "@" .. argv[4]}
      end
      disks[argv[i]] = name .. "@" .. argv[4]
    end
    for _, snapshot in pairs(disks) do
      local errno = zfs.sync.snapshot(snapshot)
      if errno ~= 0 then
        return {errno = errno, at = snapshot}
      end
    end
    local made = {}
    for machine, snapshot in pairs(disks) do
      mark(snapshot, "name", argv[4])
      mark(snapshot, "kind", "checkpoint") -- last: it makes it one
      made[machine] = {created = value(snapshot, "creation"), guid = value(snapshot, "guid")}
    end
    return {made = made}
  end

  -- ITEM...: VOLUME takes over, first:VOLUME where there must be no disk yet, same:VOLUME is the disk and
  -- untouched since it was cloned, or VOLUME@SNAPSHOT is gone back to
  if operation == "switch" then
    local fresh, former, back = {}, {}, {}
    for i = 4, #argv do
      local name, short = string.match(argv[i], "^(.+)@(.+)$")
      if name then
        local volume = {snapshots = snapshots(name)}
        if newest(volume) ~= short then
          return {refused = "changed", at = name}
        end
        local errno = zfs.check.rollback(name)
        if errno ~= 0 then
          return {errno = errno, at = name}
        end
        back[name] = volume
      elseif string.sub(argv[i], 1, 5) == "same:" then
        name = string.sub(argv[i], 6)
        local volume = look_at(name)
        if volume.marks.state ~= "disk" or next(volume.snapshots) or volume.written ~= 0 then
          return {refused = "changed", at = name}
        end
        if busy(name, volume) then
          return {refused = "busy", at = name}
        end
        fresh[name] = volume.marks.base
      else
        name = string.match(argv[i], "^first:(.+)$") or argv[i]
        local volumes = look(VMS, string.match(string.sub(name, #VMS + 1), "^(.+)%.%d+$"))
        if not volumes[name] or volumes[name].marks.state ~= "new" then
          return {refused = "changed", at = name}
        end
        local old = disk_of(volumes)
        if old then
          if name ~= argv[i] then
            return {refused = "exists", at = old}
          end
          if not is_farms(volumes[old]) then
            return {refused = "changed", at = old}
          end
          if busy(old, volumes[old]) then
            return {refused = "busy", at = old}
          end
          former[old] = volumes[old]
        end
        fresh[name] = volumes[name].marks.base
      end
    end
    for name, base in pairs(fresh) do
      local errno = start(name, base)
      if errno ~= 0 then
        return {errno = errno, at = name}
      end
    end
    for name in pairs(fresh) do
      mark(name, "state", "disk")
    end
    for name, volume in pairs(back) do
      roll_back(name, volume)
    end
    for name in pairs(former) do
      mark(name, "state", "kept")
    end
    for name, volume in pairs(former) do
      retire(name, volume)
    end
    return {}
  end

  if operation == "destroy" then -- MACHINE: all its volumes, newest first: they grew from older ones
    local volumes, names = look(VMS, argv[4]), {}
    for name, volume in pairs(volumes) do
      if ours(volume, name) then
        if not is_farms(volume) then
          return {refused = "foreign", at = name}
        end
        names[#names + 1] = name
      end
    end
    table.sort(names, function(a, b) return number(a) > number(b) end)
    local also = {}
    for _, name in ipairs(names) do
      also[name] = true
    end
    for _, name in ipairs(names) do
      if busy(name, volumes[name]) then
        return {refused = "busy", at = name}
      end
      local other = foreign(name, volumes[name], also)
      if other then
        return {refused = "in use", at = name, by = other}
      end
    end
    for _, name in ipairs(names) do
      mark(name, "state", "gone")
    end
    for _, name in ipairs(names) do
      local failed = remove(name, volumes[name])
      if failed then
        return failed
      end
    end
    return {}
  end

  if operation == "forget" then -- MACHINE CHECKPOINT; its volume, too, if that isn't the disk nor has others
    local volumes = look(VMS, argv[4])
    local present = disk_of(volumes)
    if not present or not is_farms(volumes[present]) then
      return {refused = "changed", at = VMS .. argv[4]}
    end
    for name, volume in pairs(volumes) do
      for short, snapshot in pairs(volume.snapshots) do
        if ours(volume, name) and snapshot.marks.kind == "checkpoint" and snapshot.marks.name == argv[5]
        then
          for clone in pairs(clones(name .. "@" .. short)) do
            return {refused = "in use", at = name .. "@" .. short, by = clone}
          end
          local errno = zfs.sync.destroy(name .. "@" .. short)
          if errno ~= 0 then
            return {errno = errno, at = name .. "@" .. short}
          end
          volume.snapshots[short] = nil
          if name ~= present then
            retire(name, volume)
          end
          return {}
        end
      end
    end
    return {}
  end

  if operation == "drop" then -- VOLUME [MARK=TEXT...]: a leftover, or a template; only with those marks
    if not zfs.exists(argv[4]) then
      return {}
    end
    local volume = look_at(argv[4])
    for i = 5, #argv do
      local key, text = string.match(argv[i], "^(%w+)=(.*)$")
      if volume.marks[key] ~= text or volume.snapshots.sealed then
        return {refused = "changed", at = argv[4]}
      end
    end
    if busy(argv[4], volume) then
      return {refused = "busy", at = argv[4]}
    end
    local other = foreign(argv[4], volume, {})
    if other then
      return {refused = "in use", at = argv[4], by = other}
    end
    return remove(argv[4], volume) or {}
  end

  error("no operation " .. tostring(operation))
end

return operate()
