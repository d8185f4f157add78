"""Shoal on Kubernetes: what people declare at the API server becomes datasets, prefetch jobs and drains of the core.

    the API server                  this package                            the controller
    Dataset, Prefetch, Pod, Node →  informers hold what is there          ←  `Shell.state`, a value
                                    ↓  each second, and at any change
                                    pure functions: objects + state → acts
                                    ↓
    status, events, gates        ←  `operator.Operator` carries them out  →  events of the core, listings of the catalog

Everything is decided anew from all that is there (level-triggered), so nothing depends on having seen a change: after
a restart, a lost watch or a new leader the next pass does what is left, and a pass that finds all done does nothing.

    datasets, prefetches, gate, nodes     what people wrote, and what follows from it. Pure, and one noun each
    conditions, schedule, quantities      parts of those. Pure
    api                                   the API server: the one module that imports the `kubernetes` client
    informer                              what is there of one kind, kept by list and watch
    lease                                 who leads: the decision is pure, the loop is thin
    record                                the controller's record as one object at the API server
    endpoints                             where the leader is
    webhook                               puts the gate on new pods; served by every replica
    operator                              the passes
    running                               the process: follow, be elected, serve, lose the lease, end

The rules:

- **One leader, and a deposed one can harm nothing.** The leader holds a `Lease`. It ends its process when it could not
  renew in time, before another may take over; and the record is one object that is replaced under the version that was
  read, so the first write of a controller that does not know yet that it was deposed is refused, and ends it.
- **What an object says of itself is in its status; what must not be lost is in its spec or in the record.** Any
  status may be deleted and comes back.
- **A sentence for people names the remedy.** Conditions carry it, and each change of one is an event.

Why not kopf: its handlers see one object at a time, while what is decided here is about several (which Prefetch comes
first, which node is the last owner, which pods wait for one dataset) and follows the core's state as much as the
objects. What would be left to write is what is here, less the informer (a hundred lines); what would come with it is
election by its own custom resource in place of a Lease, its bookkeeping in annotations of every object, and rights to
list definitions and namespaces. Of the `kubernetes` client the configuration and credentials are used (kubeconfig,
service account tokens that are renewed, exec plugins); its calls block and its watches hold a thread each, so requests
go through aiohttp, which serves the webhook too.

Why `Dataset` is of the cluster and `Prefetch` of a namespace: a dataset's name is one name in the whole cache, whoever
reaches the cache may read it, and its credentials are the cache's. A namespaced object would promise a separation that
is not there, and two namespaces could claim one name. So a dataset is the platform team's, like a StorageClass, and
`secretRef` names a Secret in Shoal's own namespace: the controller reads secrets nowhere else, and nobody can have it
read another team's. A Prefetch asks for work and reveals nothing, so a team makes it where its job runs, without rights
in the cluster.

The rights it needs (resource: verbs: why). In the cluster:

    shoal.io datasets                 get, list, watch, patch    what is declared; the finalizer is metadata
    shoal.io datasets/status          patch
    shoal.io prefetches               get, list, watch, patch, delete    delete: ttlSecondsAfterFinished
    shoal.io prefetches/status        patch
    pods                              list, watch, patch         of those labelled: the gate, the affinity. Where the
                                                                 gate is; with --gate-namespace only there
    nodes                             list, watch                cordons, taints, deletions
    events                            create                     in any namespace: of a Prefetch, of a pod that waits

In its own namespace, by name where a name is given:

    secrets NAME-record               get, update                the record; NAME is --lease-name. Also create, where
                                                                 nobody else makes it, empty
    secrets that datasets name        get
    leases NAME                       get, create, update        the election
    endpointslices NAME               get, create, update        where the leader is
"""
