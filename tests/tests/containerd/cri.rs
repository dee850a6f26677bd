//! A client of containerd's plugin for Kubernetes: what a kubelet asks of it.

use std::cell::RefCell;
use std::path::Path;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use isopod_tests::engine::{IMAGE, Run};
use k8s_cri::v1::runtime_service_client::RuntimeServiceClient;
use k8s_cri::v1::{
    ContainerConfig, ContainerMetadata, ContainerStats, ContainerStatus, CreateContainerRequest,
    DnsConfig, ExecSyncRequest, ImageSpec, LinuxContainerConfig, LinuxContainerResources,
    LinuxContainerSecurityContext, LinuxPodSandboxConfig, LinuxSandboxSecurityContext,
    ListPodSandboxRequest, Mount, NamespaceMode, NamespaceOption, PodSandboxConfig,
    PodSandboxMetadata, PodSandboxStatus, RuntimeHandlerFeatures,
};
use tokio::net::UnixStream;
use tokio::runtime::Runtime;
use tonic::transport::{Channel, Endpoint, Uri};

/// Time limit of a call.
const LIMIT: Duration = Duration::from_secs(120);

/// The client of one case.
pub(crate) struct Cri<'r, 'e> {
    pub(crate) run: &'r Run<'e>,
    runtime: Runtime,
    client: RefCell<RuntimeServiceClient<Channel>>,
}

/// A pod that runs.
pub(crate) struct Pod<'c, 'r, 'e> {
    pub(crate) cri: &'c Cri<'r, 'e>,
    pub(crate) id: String,
    pub(crate) config: PodSandboxConfig,
}

/// The outcome of a command in a container.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Outcome {
    pub(crate) status: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// Sends a request, and returns the response or the error's text.
macro_rules! call {
    ($cri:expr, $method:ident, $request:expr) => {{
        let mut client = $cri.client.borrow_mut();
        let request = $request;
        let what = format!(concat!(stringify!($method), " {:?}"), request);
        let answer = $cri
            .runtime
            .block_on(async { tokio::time::timeout(LIMIT, client.$method(request)).await });
        match answer {
            Ok(Ok(response)) => Ok(response.into_inner()),
            Ok(Err(status)) => Err(status.message().to_owned()),
            Err(_) => panic!("{what}: no answer"),
        }
    }};
}

/// Sends several requests at the same time, and returns all responses.
macro_rules! at_once {
    ($cri:expr, $method:ident, $requests:expr) => {{
        let calls: Vec<_> = $requests
            .map(|request| {
                let mut client = $cri.client.borrow().clone();
                async move { tokio::time::timeout(LIMIT, client.$method(request)).await }
            })
            .collect();
        let what = stringify!($method);
        $cri.runtime.block_on(async {
            let mut tasks = Vec::new();
            for call in calls {
                tasks.push(tokio::spawn(call));
            }
            let mut answers = Vec::new();
            for task in tasks {
                let answer =
                    task.await.expect("a call").unwrap_or_else(|_| panic!("{what}: no answer"));
                let response = answer.unwrap_or_else(|e| panic!("{what}: {}", e.message()));
                answers.push(response.into_inner());
            }
            answers
        })
    }};
}

impl<'r, 'e> Cri<'r, 'e> {
    pub(crate) fn new(run: &'r Run<'e>) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.expect("an event loop");
        let socket = run.engine.dir().join("containerd.sock");
        let connect = tower::service_fn(move |_: Uri| {
            let socket = socket.clone();
            async move { UnixStream::connect(socket).await.map(TokioIo::new) }
        });
        let endpoint = Endpoint::from_static("http://localhost");
        let channel = runtime.block_on(endpoint.connect_with_connector(connect));
        let client = RefCell::new(RuntimeServiceClient::new(channel.expect("a connection")));
        let cri = Self { run, runtime, client };
        // After a start, the plugin looks for its pods first.
        let begun = std::time::Instant::now();
        while let Err(error) = call!(cri, list_pod_sandbox, ListPodSandboxRequest::default()) {
            assert!(begun.elapsed() < LIMIT, "the plugin for pods does not answer: {error}");
            std::thread::sleep(Duration::from_millis(200));
        }
        cri
    }

    /// Waits until the plugin has read the network of this name, for the pods to come.
    #[track_caller]
    pub(crate) fn await_network(&self, name: &str) {
        let begun = std::time::Instant::now();
        loop {
            let request = k8s_cri::v1::StatusRequest { verbose: true };
            let answer = call!(self, status, request);
            let info = answer.unwrap_or_else(|error| panic!("Status: {error}")).info;
            let networks = info.get("cniconfig").expect("the configuration of networks");
            if networks.contains(&format!("\"{name}\"")) {
                return;
            }
            assert!(begun.elapsed() < LIMIT, "no network {name}: {networks}");
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// The features of a handler, as the kubelet asks for them.
    #[track_caller]
    pub(crate) fn features(&self, handler: &str) -> RuntimeHandlerFeatures {
        let answer = call!(self, status, k8s_cri::v1::StatusRequest { verbose: false });
        let handlers = answer.unwrap_or_else(|error| panic!("Status: {error}")).runtime_handlers;
        let own = handlers.into_iter().find(|found| found.name == handler);
        own.and_then(|handler| handler.features).expect("the features of the handler")
    }

    /// The configuration of a pod of this case.
    pub(crate) fn pod_config(&self, name: &str) -> PodSandboxConfig {
        let logs = self.run.engine.dir().join("pod-logs").join(self.run.name(name));
        std::fs::create_dir_all(&logs).expect("a directory for logs");
        PodSandboxConfig {
            metadata: Some(PodSandboxMetadata {
                name: self.run.name(name),
                uid: self.run.name(&format!("{name}-uid")),
                namespace: "test".into(),
                attempt: 0,
            }),
            hostname: name.to_owned(),
            log_directory: logs.to_string_lossy().into_owned(),
            dns_config: Some(DnsConfig {
                servers: vec!["10.88.7.1".into()],
                searches: vec!["cluster.local".into()],
                options: Vec::new(),
            }),
            linux: Some(LinuxPodSandboxConfig {
                cgroup_parent: self.run.engine.cgroup(),
                security_context: Some(LinuxSandboxSecurityContext {
                    namespace_options: Some(namespaces(NamespaceMode::Container)),
                    ..LinuxSandboxSecurityContext::default()
                }),
                ..LinuxPodSandboxConfig::default()
            }),
            ..PodSandboxConfig::default()
        }
    }

    /// Runs a pod.
    #[track_caller]
    pub(crate) fn pod(&self, config: PodSandboxConfig) -> Pod<'_, 'r, 'e> {
        self.try_pod(config).unwrap_or_else(|error| panic!("RunPodSandbox: {error}"))
    }

    /// Runs several pods at the same time.
    #[track_caller]
    pub(crate) fn pods(&self, configs: Vec<PodSandboxConfig>) -> Vec<Pod<'_, 'r, 'e>> {
        let requests = configs.iter().map(|config| k8s_cri::v1::RunPodSandboxRequest {
            config: Some(config.clone()),
            runtime_handler: self.run.with.name().to_owned(),
        });
        let ids = at_once!(self, run_pod_sandbox, requests);
        let pods = ids.into_iter().zip(configs);
        pods.map(|(answer, config)| self.known(answer.pod_sandbox_id, config)).collect()
    }

    /// Stops and removes several pods, all of them at the same time.
    #[track_caller]
    pub(crate) fn remove(&self, pods: Vec<Pod<'_, 'r, 'e>>) {
        let ids = || pods.iter().map(|pod| pod.id.clone());
        let stop =
            ids().map(|pod_sandbox_id| k8s_cri::v1::StopPodSandboxRequest { pod_sandbox_id });
        at_once!(self, stop_pod_sandbox, stop);
        let remove =
            ids().map(|pod_sandbox_id| k8s_cri::v1::RemovePodSandboxRequest { pod_sandbox_id });
        at_once!(self, remove_pod_sandbox, remove);
        for pod in pods {
            std::fs::remove_dir_all(&pod.config.log_directory).expect("the logs");
        }
    }

    /// A pod that runs already.
    pub(crate) fn known(&self, id: String, config: PodSandboxConfig) -> Pod<'_, 'r, 'e> {
        Pod { cri: self, id, config }
    }

    /// Runs a pod, or returns the error's text.
    #[track_caller]
    pub(crate) fn try_pod(&self, config: PodSandboxConfig) -> Result<Pod<'_, 'r, 'e>, String> {
        self.try_pod_of(self.run.with.name(), config)
    }

    /// Runs a pod by a handler, or returns the error's text.
    #[track_caller]
    pub(crate) fn try_pod_of(
        &self,
        handler: &str,
        config: PodSandboxConfig,
    ) -> Result<Pod<'_, 'r, 'e>, String> {
        let request = k8s_cri::v1::RunPodSandboxRequest {
            config: Some(config.clone()),
            runtime_handler: handler.to_owned(),
        };
        let id = call!(self, run_pod_sandbox, request)?.pod_sandbox_id;
        Ok(Pod { cri: self, id, config })
    }
}

/// The namespaces of a pod or container: the pod's network and ipc.
pub(crate) fn namespaces(pid: NamespaceMode) -> NamespaceOption {
    NamespaceOption {
        network: NamespaceMode::Pod.into(),
        ipc: NamespaceMode::Pod.into(),
        pid: pid.into(),
        ..NamespaceOption::default()
    }
}

/// The configuration of a container that runs a command.
pub(crate) fn container(name: &str, command: &[&str]) -> ContainerConfig {
    ContainerConfig {
        metadata: Some(ContainerMetadata { name: name.to_owned(), attempt: 0 }),
        image: Some(ImageSpec {
            image: format!("docker.io/library/{IMAGE}:latest"),
            ..ImageSpec::default()
        }),
        command: command.iter().map(|&word| word.to_owned()).collect(),
        log_path: format!("{name}.log"),
        linux: Some(LinuxContainerConfig {
            security_context: Some(LinuxContainerSecurityContext {
                namespace_options: Some(namespaces(NamespaceMode::Container)),
                ..LinuxContainerSecurityContext::default()
            }),
            ..LinuxContainerConfig::default()
        }),
        ..ContainerConfig::default()
    }
}

/// The configuration of a container that runs a shell script.
pub(crate) fn script(name: &str, script: &str) -> ContainerConfig {
    container(name, &["/bin/sh", "-c", script])
}

/// A volume.
pub(crate) fn mount(host: &Path, container: &str) -> Mount {
    Mount {
        host_path: host.to_string_lossy().into_owned(),
        container_path: container.to_owned(),
        ..Mount::default()
    }
}

impl Pod<'_, '_, '_> {
    /// Creates a container.
    #[track_caller]
    pub(crate) fn create(&self, config: ContainerConfig) -> String {
        self.try_create(config).unwrap_or_else(|error| panic!("CreateContainer: {error}"))
    }

    /// Creates a container, or returns the error's text.
    #[track_caller]
    pub(crate) fn try_create(&self, config: ContainerConfig) -> Result<String, String> {
        let request = CreateContainerRequest {
            pod_sandbox_id: self.id.clone(),
            config: Some(config),
            sandbox_config: Some(self.config.clone()),
        };
        Ok(call!(self.cri, create_container, request)?.container_id)
    }

    /// Creates and starts a container.
    #[track_caller]
    pub(crate) fn start(&self, config: ContainerConfig) -> String {
        let id = self.create(config);
        self.try_start(&id).unwrap_or_else(|error| panic!("StartContainer: {error}"));
        id
    }

    /// Starts a container, or returns the error's text.
    #[track_caller]
    pub(crate) fn try_start(&self, id: &str) -> Result<(), String> {
        let request = k8s_cri::v1::StartContainerRequest { container_id: id.to_owned() };
        call!(self.cri, start_container, request).map(drop)
    }

    /// Runs a shell script in a container, with any exit status.
    #[track_caller]
    pub(crate) fn exec(&self, id: &str, script: &str) -> Outcome {
        self.exec_within(id, script, 0)
            .unwrap_or_else(|error| panic!("ExecSync {script:?}: {error}"))
    }

    /// Runs a shell script in a container, for so many seconds at most, or returns the error's text.
    #[track_caller]
    pub(crate) fn exec_within(
        &self,
        id: &str,
        script: &str,
        timeout: i64,
    ) -> Result<Outcome, String> {
        let request = ExecSyncRequest {
            container_id: id.to_owned(),
            cmd: ["/bin/sh", "-c", script].map(str::to_owned).to_vec(),
            timeout,
        };
        let answer = call!(self.cri, exec_sync, request)?;
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        let (stdout, stderr) = (text(answer.stdout), text(answer.stderr));
        Ok(Outcome { status: answer.exit_code, stdout, stderr })
    }

    /// The output of a shell script that has to succeed, without the last line's end.
    #[track_caller]
    pub(crate) fn shell(&self, id: &str, script: &str) -> String {
        let outcome = self.exec(id, script);
        assert_eq!(outcome.status, 0, "{script}: {outcome:?}");
        outcome.stdout.trim_end().to_owned()
    }

    /// The status of a container.
    #[track_caller]
    pub(crate) fn status(&self, id: &str) -> ContainerStatus {
        let request =
            k8s_cri::v1::ContainerStatusRequest { container_id: id.to_owned(), verbose: false };
        let answer = call!(self.cri, container_status, request);
        answer.expect("ContainerStatus").status.expect("a status")
    }

    /// Waits until a container has exited, and returns its status.
    #[track_caller]
    pub(crate) fn exited(&self, id: &str) -> ContainerStatus {
        let begun = std::time::Instant::now();
        loop {
            let status = self.status(id);
            if status.state == k8s_cri::v1::ContainerState::ContainerExited as i32 {
                return status;
            }
            assert!(begun.elapsed() < LIMIT, "it does not exit: {status:?}");
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// The statistics of a container.
    #[track_caller]
    pub(crate) fn stats(&self, id: &str) -> ContainerStats {
        let request = k8s_cri::v1::ContainerStatsRequest { container_id: id.to_owned() };
        let answer = call!(self.cri, container_stats, request);
        answer.unwrap_or_else(|error| panic!("ContainerStats: {error}")).stats.expect("statistics")
    }

    /// Changes the limits of a container.
    #[track_caller]
    pub(crate) fn update(&self, id: &str, resources: LinuxContainerResources) {
        let request = k8s_cri::v1::UpdateContainerResourcesRequest {
            container_id: id.to_owned(),
            linux: Some(resources),
            ..Default::default()
        };
        let answer = call!(self.cri, update_container_resources, request);
        answer.unwrap_or_else(|error| panic!("UpdateContainerResources: {error}"));
    }

    /// Stops a container, with so many seconds until it is killed.
    #[track_caller]
    pub(crate) fn stop(&self, id: &str, timeout: i64) {
        let container_id = id.to_owned();
        let request = k8s_cri::v1::StopContainerRequest { container_id, timeout };
        call!(self.cri, stop_container, request).expect("StopContainer");
    }

    /// Removes a container.
    #[track_caller]
    pub(crate) fn remove_container(&self, id: &str) {
        let request = k8s_cri::v1::RemoveContainerRequest { container_id: id.to_owned() };
        call!(self.cri, remove_container, request).expect("RemoveContainer");
    }

    /// The status of the pod.
    #[track_caller]
    pub(crate) fn pod_status(&self) -> PodSandboxStatus {
        let request = k8s_cri::v1::PodSandboxStatusRequest {
            pod_sandbox_id: self.id.clone(),
            verbose: false,
        };
        let answer = call!(self.cri, pod_sandbox_status, request);
        answer.expect("PodSandboxStatus").status.expect("a status")
    }

    /// The runtime's own information about the pod, as `crictl inspectp` shows it.
    #[track_caller]
    pub(crate) fn pod_info(&self) -> serde_json::Value {
        let request =
            k8s_cri::v1::PodSandboxStatusRequest { pod_sandbox_id: self.id.clone(), verbose: true };
        let answer = call!(self.cri, pod_sandbox_status, request).expect("PodSandboxStatus");
        serde_json::from_str(answer.info.get("info").expect("information")).expect("JSON")
    }

    /// The statistics of the pod.
    #[track_caller]
    pub(crate) fn pod_stats(&self) -> k8s_cri::v1::PodSandboxStats {
        let request = k8s_cri::v1::PodSandboxStatsRequest { pod_sandbox_id: self.id.clone() };
        let answer = call!(self.cri, pod_sandbox_stats, request);
        answer.unwrap_or_else(|error| panic!("PodSandboxStats: {error}")).stats.expect("statistics")
    }

    /// The log of a container, as the kubelet reads it: lines without time and stream.
    pub(crate) fn log(&self, name: &str) -> String {
        let path = Path::new(&self.config.log_directory).join(format!("{name}.log"));
        let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path:?}: {e}"));
        let line = |line: &str| line.splitn(4, ' ').nth(3).unwrap_or_default().to_owned();
        text.lines().map(line).collect::<Vec<_>>().join("\n")
    }

    /// Stops and removes the pod.
    #[track_caller]
    pub(crate) fn remove(self) {
        self.cri.remove(vec![self]);
    }
}
